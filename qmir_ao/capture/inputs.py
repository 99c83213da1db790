"""What a captured graph may be called with, checked in the graph itself with a readable message."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from qmir_ao.capture.size_rules import insert_size_checks
from qmir_ao.errors import CaptureError, ConfigError


def check_input(
    x: Tensor, name: str, sizes: Sequence[int | None], largest: Sequence[int | None] = ()
) -> Tensor:
    """Return `x` if every fixed size agrees; the first call in each captured graph.

    Args:
        x: an input of the graph.
        name: its name, for the message.
        sizes: one entry per dimension; None where other sizes are allowed.
        largest: one entry per dimension, its largest size or None; or nothing for no limits.

    Raises:
        ConfigError: another rank or a size that the captured graph does not cover.
    """
    limits = largest or [None] * len(sizes)
    fits = x.dim() == len(sizes) and all(
        (want is None or got == want) and (most is None or got <= most)
        for got, want, most in zip(x.shape, sizes, limits, strict=True)
    )
    if not fits:
        words = [
            str(want) if want is not None else "any" if most is None else f"up to {most}"
            for want, most in zip(sizes, limits, strict=True)
        ]
        allowed = "(" + ", ".join(words) + ")"
        raise ConfigError(
            f"input {name!r} has shape {tuple(x.shape)}, but the model was captured for {allowed}; "
            "capture it again with example_inputs (and dynamic_shapes) that cover this shape"
        )
    return x


def insert_input_checks(graph_module: GraphModule) -> None:
    """Replace torch.export's guard call by `check_input` and, where sizes decide, `check_sizes`."""
    graph = graph_module.graph
    for node in list(graph.nodes):
        if node.op == "call_module" and str(node.target).startswith("_guards"):
            graph.erase_node(node)
            graph_module.delete_submodule(str(node.target))
    inputs = []
    for node in [n for n in graph.nodes if n.op == "placeholder"]:
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or not node.users:
            continue
        sizes = [_fixed(s) for s in value.shape]
        with graph.inserting_after(node):
            checked = graph.call_function(check_input, (node, node.name, sizes, *_limits(value)))
        checked.meta = dict(node.meta)
        node.replace_all_uses_with(checked, delete_user_cb=lambda n, c=checked: n is not c)
        inputs.append(checked)
    if inputs:
        insert_size_checks(graph_module, inputs)
    graph_module.recompile()


def _fixed(size: int | torch.SymInt) -> int | None:
    """A size that is a number, also where a decision in the forward made it one."""
    if isinstance(size, int):
        return size
    return int(size.node.expr) if size.node.expr.is_Integer else None


def _limits(value: Tensor) -> tuple[list[int | None], ...]:
    """Largest sizes that torch.export found, as further arguments; nothing where it found none.

    An example within one attention window, say, gives a graph for one window.
    """
    found: list[int | None] = []
    for size in value.shape:
        limit = None
        if isinstance(size, torch.SymInt):
            upper = size.node.shape_env.bound_sympy(size.node.expr).upper
            limit = int(upper) if upper.is_Integer else None
        found.append(limit)
    return () if all(limit is None for limit in found) else (found,)


def check_dtypes(model: torch.nn.Module) -> None:
    """Raise `CaptureError` where a parameter is of another floating-point type than float32."""
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.dtype != torch.float32:
            raise CaptureError(
                f"parameter {name!r} is {parameter.dtype}; quantizers are trained, and integers "
                "made, in torch.float32: pass model.float(), and train under torch.autocast for "
                "bfloat16"
            )


def check_devices(model: torch.nn.Module, example_inputs: Sequence[Any]) -> None:
    """Raise `CaptureError` where parameters and example tensors are on more than one device."""
    places: dict[torch.device, str] = {}
    for name, parameter in model.named_parameters():
        places.setdefault(parameter.device, name)
    if len(places) > 1:
        found = ", ".join(f"{name!r} on {device}" for device, name in places.items())
        raise CaptureError(
            f"the model mixes devices ({found}); move it to one, e.g. model.to('cpu')"
        )
    if not places:
        return
    (device,) = places
    for position, x in enumerate(example_inputs):
        if isinstance(x, Tensor) and x.device != device:
            raise CaptureError(
                f"example_inputs[{position}] is on {x.device}, but the model is on {device}; "
                f"move one of them, e.g. example_inputs[{position}].to({str(device)!r})"
            )


def check_constants(graph_module: GraphModule) -> None:
    """Raise `CaptureError` where a traced graph holds a constant on a device of its own.

    A symbolic trace runs what makes a constant, so nothing fails before the network is used.
    """
    places = {p.device for p in graph_module.parameters()}
    for node in graph_module.graph.nodes:
        if node.op != "get_attr" or not node.users:
            continue
        value: Any = graph_module
        for part in str(node.target).split("."):
            value = getattr(value, part)
        if isinstance(value, Tensor) and places and value.device not in places:
            user = next(iter(node.users))
            stack = user.meta.get("nn_module_stack") or {}
            path = next((e[0] for e in reversed(stack.values()) if isinstance(e, tuple)), "")
            raise CaptureError(
                f"node {user.name} in module {path!r} mixes devices: {node.target} is on "
                f"{value.device}, the parameters on {', '.join(sorted(map(str, places)))}; make "
                "constants on the device of the input, such as device=x.device"
            )
