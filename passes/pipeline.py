"""The ordered list of passes of each target, and how they run."""

import dataclasses

from torch.fx import GraphModule

from qmir_ao.errors import PassOrderError
from qmir_ao.passes.base import Pass
from qmir_ao.passes.convert_quantizers import ConvertQuantizers
from qmir_ao.passes.fold import FoldConstants, FoldWeights
from qmir_ao.passes.invariants import check_invariants
from qmir_ao.passes.lower import DecomposeFakeQuantize, LowerConv, LowerLinear, LowerScan
from qmir_ao.passes.normalize import InlineModules, NormalizeOperators

NORMALIZE: tuple[Pass, ...] = (InlineModules(), NormalizeOperators())

CPU: tuple[Pass, ...] = (
    *NORMALIZE,
    ConvertQuantizers(),
    # Before FoldWeights: a weight is often a reshaped parameter, which has to be a constant first.
    FoldConstants(),
    FoldWeights(),
    LowerLinear(),
    LowerConv(),
    LowerScan(),
)

# What torch.compile hands over: modules are traced through already, parameters are inputs.
COMPILE: tuple[Pass, ...] = (
    NormalizeOperators(),
    DecomposeFakeQuantize(),
    FoldWeights(),
    LowerLinear(),
    LowerConv(),
    LowerScan(),
)


@dataclasses.dataclass(frozen=True)
class PassRecord:
    """One pass that ran and how many places it changed."""

    name: str
    changed: int


def check_order(passes: tuple[Pass, ...], given: frozenset[str] = frozenset()) -> None:
    """Raise `PassOrderError` listing every pass that stands before one it requires."""
    seen = set(given)
    unmet = []
    for one in passes:
        unmet += [f"{one.name} requires {name}" for name in one.requires if name not in seen]
        seen.add(one.name)
    if unmet:
        raise PassOrderError("passes are in the wrong order: " + "; ".join(unmet))


def run_passes(graph_module: GraphModule, passes: tuple[Pass, ...]) -> list[PassRecord]:
    """Run passes in order on a graph, in place, checking its invariants after each."""
    records = []
    for one in passes:
        changed = one.rewrite(graph_module)
        if changed:
            graph_module.graph.eliminate_dead_code()
            graph_module.recompile()
        check_invariants(graph_module, one.name)
        records.append(PassRecord(one.name, changed))
    return records
