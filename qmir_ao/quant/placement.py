"""Which operators stay in float by default: what the paper keeps in float, for any network.

First and last convolution, the upsampler and channel attention are recognised in the graph;
`conv_after_body` and the like, which no structure gives away, by their published names.
"""

import re
from typing import Any

from torch.ao.quantization import QConfig, QConfigMapping
from torch.fx import GraphModule, Node

from qmir_ao.errors import ConfigError
from qmir_ao.quant.patterns import (
    CONV,
    LINEAR,
    PATTERNS,
    POOLS,
    SCAN,
    SHUFFLES,
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


def resolve(mapping: QConfigMapping, node: Node, kind: str) -> tuple[bool, QConfig | None]:
    """The QConfig of a node, as (given by name or type, which); torch.ao's order of precedence."""
    named, qconfig = explicit(mapping, module_path(node))
    if named:
        return True, qconfig
    pattern = next(p for p in PATTERNS if p.kind == kind)
    keys = {*pattern.targets, *pattern.modules}
    classes = set(module_classes(node))
    for key, qconfig in mapping.object_type_qconfigs.items():
        qualified = f"{key.__module__}.{key.__qualname__}" if isinstance(key, type) else None
        same_class = key in pattern.modules and (not classes or {qualified, key} & classes)
        if (key in keys and not isinstance(key, type)) or same_class:
            return True, qconfig
    return False, mapping.global_qconfig
