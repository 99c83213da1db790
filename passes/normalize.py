"""Bring the graphs of both captures to one vocabulary before conversion."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node
from torch.nn import functional as F

from qmir_ao.passes.base import Pass
from qmir_ao.passes.inline import inline_forward
from qmir_ao.quant.constants import constant_value, sizes_of
from qmir_ao.quant.patterns import is_constant, module_of
from qmir_ao.quant.prepare import is_fake_quantize

aten = torch.ops.aten

CONV_RANK: dict[Any, int] = {
    F.conv1d: 1,
    F.conv2d: 2,
    aten.conv1d.default: 1,
    aten.conv2d.default: 2,
    aten.conv1d.padding: 1,
    aten.conv2d.padding: 2,
}
_CONV_ATEN: dict[int, Any] = {1: aten.conv1d.default, 2: aten.conv2d.default}
CONV_NAMES = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
CONV_DEFAULTS = (None, None, None, 1, 0, 1, 1)
_LINEAR_NAMES = ("input", "weight", "bias")
_DROPOUTS: tuple[Any, ...] = (
    aten.dropout.default,
    aten.feature_dropout.default,
    aten.alpha_dropout.default,
    aten.feature_alpha_dropout.default,
    F.dropout,
    F.dropout1d,
    F.dropout2d,
    F.dropout3d,
    F.alpha_dropout,
    F.feature_alpha_dropout,
)


def named_arguments(node: Node, names: Sequence[str], defaults: Sequence[Any]) -> list[Any]:
    """Arguments in the order of `names`, whether they were given by position or by name."""
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    return [given.get(name, default) for name, default in zip(names, defaults, strict=True)]


def _same_padding(kernel: Sequence[int], dilation: Sequence[int]) -> tuple[list[int], list[int]]:
    """Padding on each side, and how many first results it makes beyond those of "same".

    Where the padding is odd, torch pads one more at the end; padded as much on both sides, the
    convolution gives one result too many, its first.
    """
    total = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    return [(t + 1) // 2 for t in total], [t % 2 for t in total]


class InlineModules(Pass):
    """Replace module calls by functions of their parameters.

    Linear and convolution modules of `torch.ao.nn.qat` become a fake-quantizer call on the weight
    and a functional operator; the common stateless and affine modules become functions. Exact.
    A module of another kind stays a call.

        before: y = call_module[conv](x)          after: w = get_attr[conv.weight]
                                                         wq = call_module[conv.weight_fake_quant](w)
                                                         y = conv2d(x, wq, conv.bias, ...)
    """

    def rewrite(self, graph_module: GraphModule) -> int:
        """Rewrite every call of a known module; see the class."""
        changed = 0
        for node in list(graph_module.graph.nodes):
            module = module_of(graph_module, node)
            if module is None or is_fake_quantize(module):
                continue
            inline = _inliner(module) or inline_forward
            with graph_module.graph.inserting_before(node):
                new = inline(graph_module, node, module)
            if new is None:
                continue
            if new is not node.args[0]:
                new.meta = dict(node.meta) | {"qmir_module": str(node.target)}
            node.replace_all_uses_with(new)
            graph_module.graph.erase_node(node)
            changed += 1
        return changed


def _attribute(graph_module: GraphModule, node: Node, name: str) -> Node | None:
    target = f"{node.target}.{name}"
    value = getattr(module_of(graph_module, node), name, None)
    return None if value is None else graph_module.graph.get_attr(target)


def _weight(graph_module: GraphModule, node: Node, module: Any) -> Node:
    weight = graph_module.graph.get_attr(f"{node.target}.weight")
    if hasattr(module, "weight_fake_quant"):
        return graph_module.graph.call_module(f"{node.target}.weight_fake_quant", (weight,))
    return weight


def _inline_linear(graph_module: GraphModule, node: Node, module: Any) -> Node:
    args = (node.args[0], _weight(graph_module, node, module))
    bias = _attribute(graph_module, node, "bias")
    return graph_module.graph.call_function(aten.linear.default, (*args, bias))


def _inline_conv(graph_module: GraphModule, node: Node, module: Any) -> Node:
    rank, padding = len(module.kernel_size), module.padding
    weight, bias = _weight(graph_module, node, module), _attribute(graph_module, node, "bias")
    if isinstance(padding, str):  # NormalizeOperators makes numbers of it
        args = (node.args[0], weight, bias, module.stride, padding, module.dilation, module.groups)
        return graph_module.graph.call_function((F.conv1d, F.conv2d)[rank - 1], args)
    sizes = (list(module.stride), list(padding), list(module.dilation), module.groups)
    return graph_module.graph.call_function(_CONV_ATEN[rank], (node.args[0], weight, bias, *sizes))


def _inline_norm(graph_module: GraphModule, node: Node, module: Any) -> Node:
    weight, bias = (_attribute(graph_module, node, n) for n in ("weight", "bias"))
    args = (node.args[0], list(module.normalized_shape), weight, bias, module.eps)
    return graph_module.graph.call_function(aten.layer_norm.default, args)


def _inline_batch_norm(graph_module: GraphModule, node: Node, module: Any) -> Node:
    names = ("weight", "bias", "running_mean", "running_var")
    tensors = (_attribute(graph_module, node, name) for name in names)
    args = (node.args[0], *tensors, module.running_mean is None, 0.0, module.eps, False)
    return graph_module.graph.call_function(aten.batch_norm.default, args)


def _inline_instance_norm(graph_module: GraphModule, node: Node, module: Any) -> Node:
    names = ("weight", "bias", "running_mean", "running_var")
    tensors = (_attribute(graph_module, node, name) for name in names)
    args = (node.args[0], *tensors, module.running_mean is None, 0.0, module.eps, False)
    return graph_module.graph.call_function(aten.instance_norm.default, args)


def _inline_identity(graph_module: GraphModule, node: Node, module: Any) -> Any:
    return node.args[0]


def _call(target: Any, *attributes: str) -> Callable[..., Node]:
    def inline(graph_module: GraphModule, node: Node, module: Any) -> Node:
        extra = (getattr(module, name) for name in attributes)
        return graph_module.graph.call_function(target, (node.args[0], *extra))

    return inline


def _inline_gelu(graph_module: GraphModule, node: Node, module: Any) -> Node:
    return graph_module.graph.call_function(
        aten.gelu.default, (node.args[0],), {"approximate": module.approximate}
    )


def _inline_pool(graph_module: GraphModule, node: Node, module: Any) -> Node:
    size = sizes_of(module.output_size, 2)
    return graph_module.graph.call_function(aten.adaptive_avg_pool2d.default, (node.args[0], size))


_INLINERS: tuple[tuple[tuple[type[nn.Module], ...], Callable[..., Any]], ...] = (
    ((nn.Linear,), _inline_linear),
    ((nn.Conv1d, nn.Conv2d), _inline_conv),
    ((nn.LayerNorm,), _inline_norm),
    ((nn.BatchNorm1d, nn.BatchNorm2d), _inline_batch_norm),
    ((nn.InstanceNorm1d, nn.InstanceNorm2d), _inline_instance_norm),
    ((nn.Identity, nn.Dropout, nn.Dropout2d), _inline_identity),
    ((nn.GELU,), _inline_gelu),
    ((nn.SiLU,), _call(aten.silu.default)),
    ((nn.ReLU,), _call(aten.relu.default)),
    ((nn.Sigmoid,), _call(aten.sigmoid.default)),
    ((nn.Tanh,), _call(aten.tanh.default)),
    ((nn.LeakyReLU,), _call(aten.leaky_relu.default, "negative_slope")),
    ((nn.PixelShuffle,), _call(aten.pixel_shuffle.default, "upscale_factor")),
    ((nn.AdaptiveAvgPool2d,), _inline_pool),
)


def _inliner(module: nn.Module) -> Callable[..., Any] | None:
    # Its forward pads first.
    if isinstance(module, nn.Conv1d | nn.Conv2d) and module.padding_mode != "zeros":
        return None
    return next((inline for kinds, inline in _INLINERS if isinstance(module, kinds)), None)


class NormalizeOperators(Pass):
    """Rewrite functional linear and convolution calls as aten operators with all arguments.

    String padding becomes numbers; dropout, which does nothing after
    training, disappears, and so do torch.export's assertions on the types that conversions get,
    which no file could hold. Exact.

        before: F.conv2d(x, w, padding="same")    after: aten.conv2d(x, w, None, [1, 1], ...)
    """

    requires = ("InlineModules",)
    ensures = ("one_vocabulary",)

    def rewrite(self, graph_module: GraphModule) -> int:
        """Rewrite every functional linear, convolution and dropout call."""
        changed = 0
        for node in list(graph_module.graph.nodes):
            if node.op != "call_function":
                continue
            if node.target is aten._assert_tensor_metadata.default:
                graph_module.graph.erase_node(node)
                changed += 1
            elif node.target in _DROPOUTS:
                node.replace_all_uses_with(node.args[0])
                graph_module.graph.erase_node(node)
                changed += 1
            elif node.target is F.linear:
                node.args = tuple(named_arguments(node, _LINEAR_NAMES, (None, None, None)))
                node.kwargs, node.target = {}, aten.linear.default
                changed += 1
            elif node.target in CONV_RANK:
                changed += _normalize_conv(graph_module, node, CONV_RANK[node.target])
        return changed


def _normalize_conv(graph_module: GraphModule, node: Node, rank: int) -> int:
    x, weight, bias, stride, padding, dilation, groups = named_arguments(
        node, CONV_NAMES, CONV_DEFAULTS
    )
    stride, dilation = sizes_of(stride, rank), sizes_of(dilation, rank)
    extra = [0] * rank
    if padding == "valid":
        padding = 0
    elif padding == "same":
        if not is_constant(weight):
            return 0
        kernel = constant_value(graph_module, weight).shape[2:]
        padding, extra = _same_padding(kernel, dilation)
    args = (x, weight, bias, stride, sizes_of(padding, rank), dilation, groups)
    if node.args == args and node.target is _CONV_ATEN[rank] and not node.kwargs:
        return 0
    node.args, node.kwargs, node.target = args, {}, _CONV_ATEN[rank]
    _drop_first(graph_module, node, extra)
    return 1


def _drop_first(graph_module: GraphModule, node: Node, counts: Sequence[int]) -> None:
    """Cut `counts` results off the beginning of the last dimensions of a convolution."""
    current, users = node, list(node.users)
    for dim, count in zip(range(-len(counts), 0), counts, strict=True):
        if count:
            with graph_module.graph.inserting_after(current):
                args = (current, dim, count, sys.maxsize)
                current = graph_module.graph.call_function(aten.slice.Tensor, args)
    for user in users:
        user.replace_input_with(node, current)
