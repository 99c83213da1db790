"""Names of what a saved graph may call: an allow-list, so that a file can name nothing else."""

import operator
from typing import Any

import torch
from torch.fx import Node
from torch.nn import functional as F

from qmir_ao.capture.inputs import check_input
from qmir_ao.capture.size_rules import check_sizes

_TORCH = (
    "add sub mul div neg exp abs flip roll stack cat split chunk unbind transpose permute flatten "
    "reshape squeeze unsqueeze sigmoid tanh relu softmax mean sum matmul bmm einsum conv1d conv2d "
    "conv_transpose2d zeros ones arange clamp sqrt rsqrt pow maximum minimum where select "
    "zeros_like ones_like narrow swapaxes movedim argmax argsort gather scatter index_select amax "
    "amin max min std var cumsum log sin cos sign square prelu channel_shuffle conv_transpose1d "
    "conv3d bmm addmm baddbmm outer rot90 group_norm instance_norm batch_norm layer_norm celu selu "
    "log_softmax full full_like unflatten linspace meshgrid sort topk"
).split()
_FUNCTIONAL = (
    "linear layer_norm batch_norm gelu silu relu leaky_relu sigmoid tanh softplus softmax pad "
    "interpolate pixel_shuffle pixel_unshuffle adaptive_avg_pool2d avg_pool2d max_pool2d normalize "
    "conv1d conv2d group_norm instance_norm unfold fold prelu hardswish hardsigmoid hardtanh mish "
    "elu celu selu relu6 logsigmoid softmin log_softmax softsign glu threshold max_pool1d "
    "avg_pool1d adaptive_avg_pool1d adaptive_max_pool2d grid_sample affine_grid rms_norm "
    "scaled_dot_product_attention cosine_similarity conv_transpose1d conv_transpose2d conv3d "
    "bilinear channel_shuffle tanhshrink softshrink hardshrink local_response_norm lp_pool2d "
    "rrelu embedding"
).split()
_OPERATOR = (
    "add sub mul matmul truediv floordiv mod neg pow getitem eq ne lt le gt ge invert and_ or_"
).split()
_FFT = (
    "fft ifft rfft irfft fft2 ifft2 rfft2 irfft2 fftn ifftn rfftn irfftn fftshift ifftshift".split()
)
_METHODS = frozenset(
    (
        "view reshape permute transpose flip contiguous expand expand_as flatten squeeze unsqueeze "
        "split chunk unbind size dim mean sum mul add sub div neg exp sigmoid softmax matmul "
        "repeat roll narrow select type_as float t view_as clamp sqrt abs to movedim argmax "
        "argsort gather scatter index_select new_ones detach amax amin max min std var pow square "
        "unflatten swapaxes bmm relu tanh rsqrt sin cos log cumsum new_zeros numel rot90 clone "
        "masked_fill sort topk"
    ).split()
)
_ATTRIBUTES = (("shape",), ("device",))
"""What `getattr` may read, as the rest of its arguments."""
# Operators that take text are refused unless the text can only name a variant of arithmetic.
_TEXT_ARGUMENTS = frozenset(
    "approximate rounding_mode equation padding indexing mode norm reduce interpolation activation "
    "gate_activation statistics".split()
)


class TargetNameError(ValueError):
    """A call, method or argument that the format has no name for."""


def _functions() -> dict[str, Any]:
    table: dict[str, Any] = {
        "qmir_ao.check_input": check_input,
        "qmir_ao.check_sizes": check_sizes,
    }
    for prefix, owner, names in (
        ("operator", operator, _OPERATOR),
        ("torch", torch, _TORCH),
        ("F", F, _FUNCTIONAL),
        ("fft", torch.fft, _FFT),
    ):
        table |= {f"{prefix}.{name}": getattr(owner, name) for name in names}
    return table


_FUNCTIONS = _functions()
_NAMES = {target: name for name, target in reversed(_FUNCTIONS.items())}


def _allowed_overload(target: torch._ops.OpOverload) -> bool:
    schema = target._schema
    texts = [a.name for a in schema.arguments if "str" in str(a.type)]
    return (
        target.namespace in ("aten", "qmir")
        and not schema.is_mutable
        and all(name in _TEXT_ARGUMENTS for name in texts)
    )


def encode_target(node: Node) -> str:
    """Name of what a node calls or reads.

    Raises:
        TargetNameError: it is not in the allow-list.
    """
    target: Any = node.target
    if node.op in ("placeholder", "get_attr", "output"):
        return str(target)
    if node.op == "call_method" and target in _METHODS:
        return str(target)
    if node.op == "call_function":
        if isinstance(target, torch._ops.OpOverload):
            return encode_overload(target)
        if isinstance(target, torch._ops.OpOverloadPacket):  # as a symbolic trace records it
            return encode_overload(target.default)
        if target is getattr and node.args[1:] in _ATTRIBUTES:
            return f"getattr.{node.args[1]}"
        if target in _NAMES:
            return _NAMES[target]
    raise TargetNameError(f"{node.op} of {target!r}")


def encode_overload(target: torch._ops.OpOverload) -> str:
    """Name of an operator overload, `namespace.name.overload`."""
    if not _allowed_overload(target):
        raise TargetNameError(f"call_function of {target}")
    return f"{target.namespace}.{target.__name__}"


def decode_target(op: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a saved node calls.

    Raises:
        TargetNameError: the name is not in the allow-list, or `getattr` reads anything but a shape
            or a device.
    """
    if (op == "output" and name == op) or (op == "call_method" and name in _METHODS):
        return name
    if op == "call_function":
        if name.startswith("getattr.") and args[1:] in _ATTRIBUTES and not kwargs:
            return getattr
        if name in _FUNCTIONS:
            return _FUNCTIONS[name]
        parts = name.split(".")
        if len(parts) == 3 and parts[0] in ("aten", "qmir"):
            packet = getattr(getattr(torch.ops, parts[0]), parts[1], None)
            target = getattr(packet, parts[2], None)
            if isinstance(target, torch._ops.OpOverload) and _allowed_overload(target):
                return target
    raise TargetNameError(f"{op} of {name!r}")
