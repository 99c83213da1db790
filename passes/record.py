"""What a pass did to a graph, read off the graph before and after it."""

import dataclasses
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch.fx import GraphModule, Node

from qmir_ao.capture.recurrence import call_name
from qmir_ao.quant.patterns import module_of, module_path

RECORDS = "qmir_passes"
"""Key of `graph_module.meta`: records of the passes that ran before the network was prepared."""


@dataclasses.dataclass(frozen=True)
class PassRecord:
    """One pass that ran.

    Attributes:
        name: of the pass.
        changed: how many places it changed.
        operators: how many more (or fewer, negative) nodes call each operator than before.
        modules: where: dotted paths, numbers in them replaced by `*` where several differ in
            numbers alone, and how many modules each stands for.
    """

    name: str
    changed: int
    operators: dict[str, int] = dataclasses.field(default_factory=dict)
    modules: dict[str, int] = dataclasses.field(default_factory=dict)

    def to_list(self) -> list[Any]:
        """Plain types, in the order of the attributes."""
        return [self.name, self.changed, self.operators, self.modules]

    def __str__(self) -> str:
        """One line, and one for the modules where there are any."""
        if not self.changed:
            return f"{self.name}: nothing to change"
        counts = ", ".join(f"{name} {n:+d}" for name, n in self.operators.items())
        lines = [f"{self.name}: {self.changed} places" + (f" ({counts})" if counts else "")]
        for path, count in self.modules.items():
            lines.append(
                f"    in {path or 'the network itself'}" + (f" x{count}" if count > 1 else "")
            )
        return "\n".join(lines)


Snapshot = dict[Node, tuple[str, str, Any]]
_UNTOLD = ("constant", "getitem")
"""Nodes that come and go with others."""
_QUANTIZER = re.compile(r"(^|\.)(activation_post_process_\d+(_\d+)?|weight_fake_quant)$")


def snapshot(graph_module: GraphModule) -> Snapshot:
    """Each node with what it calls and the module it came from."""
    return {
        n: (_called(graph_module, n), _path(n), n.target)
        for n in graph_module.graph.nodes
        if n.op not in ("placeholder", "output")
    }


def _called(graph_module: GraphModule, node: Node) -> str:
    if node.op == "get_attr":
        return "constant"
    module = module_of(graph_module, node)
    if module is not None:
        return type(module).__name__
    own = getattr(node.target, "namespace", "") == "qmir"
    return f"qmir.{call_name(node)}" if own else call_name(node)


def _path(node: Node) -> str:
    path = str(node.meta.get("qmir_module") or module_path(node))
    return _QUANTIZER.sub("", path)


def make_record(name: str, changed: int, before: Snapshot, after: Snapshot) -> PassRecord:
    """The record of a pass between two snapshots."""
    if not changed:
        return PassRecord(name, 0)
    counts = Counter(called for called, _, _ in after.values())
    counts.subtract(called for called, _, _ in before.values())
    operators = {k: n for k, n in sorted(counts.items()) if n}
    touched = {n: v for n, v in before.items() if n not in after}
    touched |= {n: v for n, v in after.items() if before.get(n) != v}
    told = {path for called, path, _ in touched.values() if called not in _UNTOLD}
    # A quantizer of activations belongs to no module of the network.
    paths = {path for path in told if path} or told
    return PassRecord(name, changed, operators, summarize(sorted(paths)))


def summarize(paths: Sequence[str]) -> dict[str, int]:
    """Dotted paths with the numbers left out where several are alike, and their counts."""
    alike: dict[str, list[str]] = {}
    for path in paths:
        alike.setdefault(re.sub(r"(?<![^.])\d+(?![^.])", "*", path), []).append(path)
    return {(k if len(v) > 1 else v[0]): len(v) for k, v in alike.items()}
