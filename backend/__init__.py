"""Targets that run lowered graphs, and the kernels behind `torch.ops.qmir.*`."""

if __name__ != "qmir_ao.backend":
    raise ImportError("import qmir_ao.backend, not backend")
