"""What adapters need to know of their operands, which may be tensors or traced proxies."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node, Proxy

from qmir_ao.errors import CaptureError


def attribute(root: Any, target: str) -> Any:
    """Value of a dotted attribute path below a module.

    Read without `getattr`, which gives proxies while the module is being traced.
    """
    for part in target.split("."):
        own = vars(root)
        kinds = (own.get(kind, {}) for kind in ("_parameters", "_buffers", "_modules"))
        held = next((kind for kind in kinds if part in kind), own)
        root = held[part] if part in held else getattr(root, part)
    return root


def evaluate_constant(root: Any, node: Node) -> Any:
    """Value of a node that depends on parameters and buffers of `root` only, else None."""
    if node.op == "get_attr":
        return attribute(root, str(node.target))
    inputs = {n: evaluate_constant(root, n) for n in node.all_input_nodes}
    if not inputs or any(v is None for v in inputs.values()):
        return None
    args = torch.fx.node.map_arg(node.args, lambda n: inputs[n])
    kwargs = torch.fx.node.map_arg(node.kwargs, lambda n: inputs[n])
    with torch.no_grad():
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        if node.op == "call_function" and callable(node.target):
            return node.target(*args, **kwargs)
    return None


def known_tensor(x: Any) -> Tensor | None:
    """`x` as a tensor whose sizes can be read: itself, or the parameter a proxy stands for."""
    if isinstance(x, Proxy):
        tracer: Any = x.tracer
        x = evaluate_constant(tracer.root, x.node)
    return x if isinstance(x, Tensor) else None


def weight_shape(x: Any, name: str, where: str) -> tuple[int, ...]:
    """Sizes of a weight as numbers.

    Raises:
        CaptureError: a symbolic trace cannot know them, since the weight is computed from an input.
    """
    tensor = known_tensor(x)
    if tensor is None:
        raise CaptureError(
            f"{where}: the sizes of {name} are unknown in a symbolic trace, because it is no "
            "parameter; pass example_inputs=(x,) to prepare_qat to capture by torch.export"
        )
    return tuple(int(s) for s in tensor.shape)


def as_groups(x: Any, channels: Callable[[], int]) -> Any:
    """B or C of a scan as (B, K, N, L), or as (1, E, N, 1) where it is a constant.

    Args:
        x: tensor or proxy, (E, N), (B, N, L) or (B, K, N, L).
        channels: gives the number of channels E; called only where a constant (E, N) is possible.
    """
    tensor = known_tensor(x)
    if tensor is not None and tensor.dim() == 2:
        return x.reshape(1, channels(), -1, 1)
    if tensor is not None and not isinstance(x, Proxy):
        return x.unsqueeze(1) if x.dim() == 3 else x
    return x.reshape(x.shape[0], -1, x.shape[-2], x.shape[-1])


def refuse(where: str, argument: str, value: Any, allowed: str) -> CaptureError:
    """The error for an argument that has no counterpart in a captured graph."""
    return CaptureError(
        f"{where} was called with {argument}={value!r:.60}, which cannot be captured; allowed: "
        f"{allowed}. Register an adapter of your own with qmir_ao.register_selective_scan."
    )
