"""Capture of a model as a graph, by torch.export or by symbolic trace."""
