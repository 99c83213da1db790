"""The ordered list of passes of each target, and how they run."""

from torch.fx import GraphModule

from qmir_ao.errors import PassOrderError
from qmir_ao.passes.base import Pass, remove_unread
from qmir_ao.passes.convert_quantizers import ConvertQuantizers
from qmir_ao.passes.dedupe_constants import DedupeConstants
from qmir_ao.passes.drop_identity import DropIdentity
from qmir_ao.passes.fold import FoldConstants, FoldWeights
from qmir_ao.passes.fuse_cross_scan import FuseCrossScan
from qmir_ao.passes.fuse_dls_statistics import FuseDlsStatistics
from qmir_ao.passes.fuse_epilogue import FuseEpilogue
from qmir_ao.passes.fuse_moments import FuseMoments
from qmir_ao.passes.fuse_norm_chain import FuseNormChain
from qmir_ao.passes.invariants import INVARIANTS, check_invariants
from qmir_ao.passes.lay_out_once import LayOutOnce
from qmir_ao.passes.lower import DecomposeFakeQuantize, LowerConv, LowerLinear, LowerScan
from qmir_ao.passes.normalize import InlineModules, NormalizeOperators
from qmir_ao.passes.record import PassRecord, make_record, snapshot
from qmir_ao.passes.share_quantize import ShareQuantize
from qmir_ao.passes.swap_einsum import SwapEinsum

# Before quantizers are inserted: training then sees the operators that will run.
CAPTURE: tuple[Pass, ...] = (
    SwapEinsum(),
    # After SwapEinsum: projections by einsum are convolutions of the image then, not of its copies.
    FuseCrossScan(),
)

NORMALIZE: tuple[Pass, ...] = (
    InlineModules(),
    NormalizeOperators(),
    # For graphs that torchao prepared without CAPTURE; before ConvertQuantizers, which takes the
    # quantizers of reordered tensors apart.
    FuseCrossScan(),
)

_INTEGERS: tuple[Pass, ...] = (
    *NORMALIZE,
    ConvertQuantizers(),
    # Before FoldWeights: a weight is often a reshaped parameter, which has to be a constant first.
    FoldConstants(),
    FoldWeights(),
    LowerLinear(),
    LowerConv(),
    LowerScan(),
    # After the integer operators are in: dequantized values that nothing reads are gone by then.
    DropIdentity(),
    # After DropIdentity: what stochastic depth leaves behind stands between operator and sum.
    FuseEpilogue(),
    # After DropIdentity: a tensor and the same tensor turned twice are one tensor then.
    ShareQuantize(),
    # After ShareQuantize, which looks for quantizers.
    FuseDlsStatistics(),
    # Grows what FuseDlsStatistics makes.
    FuseNormChain(),
)

_LAST: tuple[Pass, ...] = (
    # After the passes that look for quantizers: a copy stands before them then.
    LayOutOnce(),
    # Last: lowering makes constants of its own (biases without channel shifts).
    DedupeConstants(),
)

CPU: tuple[Pass, ...] = (*_INTEGERS, *_LAST)

# On a GPU memory limits, and so a second reading; on a CPU the caches hold what is read again, and
# the statistics of tiles take longer (docs/performance.md). Every operator has a CUDA kernel.
CUDA: tuple[Pass, ...] = (*_INTEGERS, FuseMoments(), *_LAST)

# What torch.compile hands over: modules are traced through already, parameters are inputs.
COMPILE: tuple[Pass, ...] = (
    NormalizeOperators(),
    FuseCrossScan(),
    DecomposeFakeQuantize(),
    FoldWeights(),
    LowerLinear(),
    LowerConv(),
    LowerScan(),
)


def check_order(passes: tuple[Pass, ...], given: frozenset[str] = frozenset()) -> None:
    """Raise `PassOrderError` listing every pass that stands before one it requires."""
    seen = set(given)
    unmet = []
    for one in passes:
        unmet += [f"{one.name} requires {name}" for name in one.requires if name not in seen]
        unmet += [
            f"{one.name} ensures {name}, which passes/invariants.py does not know"
            for name in one.ensures
            if name not in INVARIANTS
        ]
        seen.add(one.name)
    if unmet:
        raise PassOrderError("passes are in the wrong order: " + "; ".join(unmet))


def run_passes(graph_module: GraphModule, passes: tuple[Pass, ...]) -> list[PassRecord]:
    """Run passes in order on a graph, in place, checking its invariants after each."""
    records = []
    ensured: dict[str, None] = {}
    before = snapshot(graph_module)
    for one in passes:
        changed = one.rewrite(graph_module)
        if changed:
            remove_unread(graph_module)
        ensured = {k: None for k in (*ensured, *one.ensures) if k not in one.breaks}
        check_invariants(graph_module, one.name, ensured)
        after = snapshot(graph_module) if changed else before
        records.append(make_record(one.name, changed, before, after))
        before = after
    if any(record.changed for record in records):
        # Once: passes read nodes, and code for thousands of them takes longer than most passes.
        graph_module.recompile()
    return records
