"""Operators `torch.ops.qmir.*`: schema, reference, shapes, backward. No kernels here."""
