"""Which operators stay in float by default: what the paper keeps in float, for any network.

First and last convolution, the upsampler and channel attention are recognised in the graph;
`conv_after_body` and the like, which no structure gives away, by their published names.
"""

import re
from typing import Any

from torch import nn
from torch.ao.quantization import QConfig, QConfigMapping
from torch.fx import GraphModule, Node

from qmir_ao.errors import ConfigError
from qmir_ao.quant.patterns import (
    CONV,
    CONV_1D,
    LINEAR,
    PATTERNS,
    POOLS,
    SCAN,
    SHUFFLES,
    Pattern,
    downstream,
    is_one_of,
    match,
    module_classes,
    module_path,
    upstream,
)

PLACEMENTS = ("paper", "official")
_FLOAT_NAMES = re.compile(
    r"^(conv_first|conv_after_body|conv_before_upsample|conv_last|upsample|patch_embed)(\.|$)"
)


def check_placement(placement: str) -> None:
    """Raise `ConfigError` unless `placement` is known."""
    if placement not in PLACEMENTS:
        raise ConfigError(
            f"placement={placement!r} is unknown; allowed: {', '.join(map(repr, PLACEMENTS))}"
        )


def float_by_default(graph_module: GraphModule) -> dict[Node, str]:
    """Quantizable nodes that stay in float, with the reason; placed as in the paper."""
    kinds = {n: p for n in graph_module.graph.nodes if (p := match(graph_module, n))}
    shuffles = {n for n in graph_module.graph.nodes if is_one_of(graph_module, n, SHUFFLES)}
    pools = {n for n in graph_module.graph.nodes if is_one_of(graph_module, n, POOLS)}
    found: dict[Node, str] = {}
    for node, pattern in kinds.items():
        reason = _reason(node, pattern.kind, kinds, shuffles, pools)
        if reason:
            found[node] = reason
    return found


def _reason(
    node: Node, kind: str, kinds: dict[Node, Any], shuffles: set[Node], pools: set[Node]
) -> str | None:
    if _FLOAT_NAMES.match(module_path(node)):
        return f"{module_path(node).split('.')[0]} stays in float, as in the paper"
    if kind not in (CONV.kind, LINEAR.kind):
        return None
    before = upstream(node, lambda n: n in pools or n in kinds)
    if _from_pool(node, pools, kinds):
        return "channel attention stays in float, as in the paper"
    if kind != CONV.kind:
        return None
    if not any(n in kinds for n in before) and any(n.op == "placeholder" for n in before):
        return "the first convolution stays in float, as in the paper"
    after = downstream(node, lambda n: n in kinds)
    if not any(n in kinds for n in after):
        return "the last convolution stays in float, as in the paper"
    near = downstream(node, lambda n: n in kinds or n in shuffles)
    tail = [n for n in near if n in shuffles]
    body = (LINEAR.kind, SCAN.kind)
    if tail and not any(
        n in kinds and kinds[n].kind in body for n in downstream(node, lambda _: False)
    ):
        return "the upsampler stays in float, as in the paper"
    return None


def _from_pool(node: Node, pools: set[Node], kinds: dict[Node, Any]) -> bool:
    """Whether the operand is a pooled vector: one input chain of pointwise operators to a pool."""
    current = node
    while True:
        inputs = [n for n in current.all_input_nodes if n.op not in ("get_attr",)]
        if current in kinds and current.op != "call_module":
            inputs = current.all_input_nodes[:1]
        if len(inputs) != 1:
            return False
        current = inputs[0]
        if current in pools:
            return True
        if current.op == "placeholder":
            return False


def as_mapping(qconfig: QConfig | QConfigMapping) -> QConfigMapping:
    """A `QConfigMapping` from what a user may pass.

    Raises:
        ConfigError: neither a QConfig nor a QConfigMapping.
    """
    if isinstance(qconfig, QConfigMapping):
        return qconfig
    if isinstance(qconfig, QConfig):
        return QConfigMapping().set_global(qconfig)
    raise ConfigError(
        f"qconfig must be a torch.ao.quantization.QConfig or QConfigMapping, got "
        f"{type(qconfig).__name__}; use qmir_ao.qmir_qconfig or qmir_ao.get_qmir_qconfig(...)"
    )


def explicit(mapping: QConfigMapping, path: str) -> tuple[bool, QConfig | None]:
    """The QConfig that the mapping gives a module by its name, as (whether it does, which)."""
    parts = path.split(".")
    for end in range(len(parts), 0, -1):
        name = ".".join(parts[:end])
        if name in mapping.module_name_qconfigs:
            return True, mapping.module_name_qconfigs[name]
    for pattern, qconfig in mapping.module_name_regex_qconfigs.items():
        if re.match(pattern, path):
            return True, qconfig
    return False, None


def overrules(mapping: QConfigMapping, path: str) -> bool:
    """Whether the mapping quantizes what stays in float by default: only by the layer's own name.

    A setting for a whole block, a pattern, a type or an operator is about what is quantized anyway.
    """
    return path in mapping.module_name_qconfigs


FAMILIES: tuple[tuple[type[nn.Module] | None, tuple[Any, ...]], ...] = (
    (nn.Linear, LINEAR.targets),
    (nn.Conv1d, CONV_1D),
    (nn.Conv2d, tuple(target for target in CONV.targets if target not in CONV_1D)),
    *((None, pattern.targets) for pattern in PATTERNS if pattern not in (LINEAR, CONV)),
)
"""Module class and call targets that mean the same operator, in one capture or the other."""


def _in_family(
    node: Node, pattern: Pattern, module: type[nn.Module] | None, targets: tuple[Any, ...]
) -> bool:
    if node.op == "call_function":
        return node.target in targets
    # Which convolution a module is, its class says.
    return module in pattern.modules and module in _classes(node)


def _classes(node: Node) -> set[Any]:
    """Classes of the innermost module, by object where the name is known."""
    names = {f"{m.__module__}.{m.__qualname__}": m for m, _ in FAMILIES if m is not None}
    return {names.get(found, found) for found in module_classes(node)}


def resolve(mapping: QConfigMapping, node: Node, kind: str) -> QConfig | None:
    """The QConfig of a node, in torch.ao's order: name, pattern, class, operator, global."""
    named, qconfig = explicit(mapping, module_path(node))
    if named:
        return qconfig
    pattern = next(p for p in PATTERNS if p.kind == kind)
    settings = mapping.object_type_qconfigs
    for key in _classes(node) & set(pattern.modules):
        if key in settings:
            return settings[key]
    for module, targets in FAMILIES:
        key = next((target for target in targets if target in settings), None)
        if key is not None and _in_family(node, pattern, module, targets):
            return settings[key]
    return mapping.global_qconfig


def spread_operators(mapping: QConfigMapping) -> None:
    """Let the setting of an operator hold for all its spellings, its module class included.

    torch.ao looks a call up as it finds it: `F.linear`, `nn.Linear` or `aten.linear` alone.
    """
    settings = mapping.object_type_qconfigs
    for module, targets in FAMILIES:
        given = next((target for target in targets if target in settings), None)
        if given is None:
            continue
        for spelling in (*targets, module):
            if spelling is not None and spelling not in settings:
                mapping.set_object_type(spelling, settings[given])
