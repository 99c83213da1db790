"""Quantizers, QConfigs and the rules that place them."""
