"""Fused chains and their codes on CUDA, run by the simulator: the CPU kernel's bytes."""

from pathlib import Path

import pytest
import torch
from support.cases import DLS_RANGES
from support.chain_cases import CHAINS, chain_arguments, same_results, views
from support.host_launcher import HostKernelError, HostLauncher, needs_compiler
from support.tolerances import BOUNDARY_STEPS, chain_grid
from support.variants import FLOAT_PAIRS, Variant, with_fault
from torch import Tensor

import qmir_ao.backend.cpu.chain_quantize  # noqa: F401  (registers the kernel)
from qmir_ao.backend.cpu.build import library
from qmir_ao.backend.cuda.chain_quantize import LONGEST_ROW, launch_chain_quantize
from qmir_ao.ops._moments import moments_ref
from qmir_ao.ops.chain_quantize import (
    STATISTICS,
    ChainArgs,
    chain_quantize_ref,
    chain_values,
)

pytestmark = needs_compiler

WAYS = [("last", s) for s in STATISTICS] + [("first", s) for s in STATISTICS if s != "token"]
ways = pytest.mark.parametrize(("layout", "statistics"), WAYS)
# A tile and a half of pixels; channels beyond one tile; codes of four at a time; single ones.
SIZES = [(3, 7, 9, 11), (2, 72, 17, 5), (2, 16, 1, 1), (2, 1, 5, 7)]
PLAIN = {"offset": False}


def on_cpu(args: ChainArgs) -> tuple[Tensor, Tensor, Tensor]:
    """What the C++ kernel gives, for which the reference must not stand in."""
    assert library() is not None
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.qmir.chain_quantize(*args)
    return found


def on_cuda(args: ChainArgs, seed: int = 0, folder: Path | None = None) -> tuple[Tensor, ...]:
    return launch_chain_quantize(HostLauncher(seed, folder), *args)


def kernels(args: ChainArgs) -> list[str]:
    launch = HostLauncher()
    launch_chain_quantize(launch, *args)
    return [kernel for _, kernel in launch.launched]


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("chain", [*CHAINS, "plain"])
@ways
def test_results_are_those_of_the_cpu(layout: str, statistics: str, chain: str) -> None:
    last = layout == "last"
    for seed, size in enumerate(SIZES):
        for name, x in views(size, last).items():
            options = CHAINS.get(chain, PLAIN)
            args = chain_arguments(x, -1 if last else -3, statistics, **options)
            assert same_results(on_cuda(args, seed), on_cpu(args)), (size, name)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("chain", ["norm, gate", "silu"])
@ways
def test_several_chunks_and_planes(layout: str, statistics: str, chain: str) -> None:
    """Chunks begin within a plane and hold several; groups have more than one."""
    last = layout == "last"
    for size in ((2, 5, 41, 43), (2, 70, 9, 13)):
        for name, x in views(size, last).items():
            args = chain_arguments(x, -1 if last else -3, statistics, **CHAINS[chain])
            assert same_results(on_cuda(args, 1), on_cpu(args)), (size, name)


@pytest.mark.parametrize("channels", [180, 360, LONGEST_ROW, LONGEST_ROW + 1])
@pytest.mark.parametrize("statistics", STATISTICS)
def test_long_rows(statistics: str, channels: int) -> None:
    x = torch.randn(1, 3, 11, channels) + 1
    args = chain_arguments(x, -1, statistics, gate=True, gate_activation="gelu")
    assert same_results(on_cuda(args, 2), on_cpu(args))
    with_norm = chain_arguments(x, -1, statistics, norm=True)
    long = channels > LONGEST_ROW
    wanted = chain_quantize_ref(*with_norm) if long else on_cpu(with_norm)
    assert same_results(on_cuda(with_norm, 3), wanted)


def test_each_layout_takes_its_way() -> None:
    """The bytes that backend/cuda/chain_quantize.py promises."""
    x = torch.randn(2, 6, 5, 8)
    turned = x.permute(0, 3, 1, 2)
    token = chain_arguments(x, -1, "token", norm=True, gate=True)
    assert kernels(token) == ["qmir_chain_tokens"]
    in_place = ["qmir_chain_chunks", "qmir_dls_finish", "qmir_chain_codes"]
    assert kernels(chain_arguments(x, -1, "sample", activation="silu")) == in_place
    assert kernels(chain_arguments(x[:, 2:4], -3, "tensor", gate=True)) == in_place
    written = ["qmir_chain_values", "qmir_dls_rows", "qmir_dls_quantize_v16"]
    assert kernels(chain_arguments(turned, -3, "sample", activation="silu")) == written
    assert kernels(chain_arguments(x, -1, "sample", norm=True)) == written


@pytest.mark.parametrize("shape", [(6,), (2, 1, 1, 6), (1, 3, 1, 1), (2, 3, 5, 1)], ids=str)
@ways
def test_gates_broadcast(layout: str, statistics: str, shape: tuple[int, ...]) -> None:
    x = torch.randn(2, 3, 5, 6)
    args = chain_arguments(x, -1 if layout == "last" else -3, statistics, norm=True)
    args = args._replace(gate=torch.randn(shape), gate_activation="sigmoid")
    assert same_results(on_cuda(args, 4), on_cpu(args))


@ways
def test_a_gate_may_lie_otherwise_than_x(layout: str, statistics: str) -> None:
    last = layout == "last"
    x, gate = views((2, 19, 9, 11), last), views((2, 19, 9, 11), last)
    for mine, other in zip(x.values(), reversed(gate.values()), strict=True):
        args = chain_arguments(mine, -1 if last else -3, statistics)._replace(gate=other)
        assert same_results(on_cuda(args, 5), on_cpu(args))


@pytest.mark.parametrize("grid", [*DLS_RANGES, (0, 255)], ids=str)
@ways
def test_ranges_of_codes_and_the_cap(layout: str, statistics: str, grid: tuple[int, int]) -> None:
    x = torch.randn(2, 6, 5, 8)
    args = chain_arguments(x, -1 if layout == "last" else -3, statistics, norm=True, grid=grid)
    for cap in (False, True):
        capped = args._replace(cap=cap)
        assert same_results(on_cuda(capped, 6), on_cpu(capped))


@pytest.mark.parametrize("shape", [(2, 3, 4, 5, 6), (7, 5), (4, 6, 9), (5,)], ids=str)
def test_other_ranks(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    for dim in {-1, 1 - len(shape)} - {0}:
        args = chain_arguments(x, dim, "sample", norm=x.dim() > 1, activation="relu")
        assert same_results(on_cuda(args), on_cpu(args))


@pytest.mark.parametrize("parts", [(True, False), (False, True), (False, False)])
def test_a_norm_without_some_of_its_weights(parts: tuple[bool, bool]) -> None:
    args = chain_arguments(torch.randn(2, 9, 7), -1, "token", norm=True)
    weight, bias = parts
    args = args._replace(
        norm_weight=args.norm_weight if weight else None, norm_bias=args.norm_bias if bias else None
    )
    assert same_results(on_cuda(args), on_cpu(args))


@pytest.mark.parametrize("chain", ["norm, gate", "gelu"])
@ways
def test_order_of_threads_does_not_matter(layout: str, statistics: str, chain: str) -> None:
    last = layout == "last"
    x = views((2, 20, 13, 17), last)["planes"]
    args = chain_arguments(x, -1 if last else -3, statistics, **CHAINS[chain])
    first = on_cuda(args, 0)
    for seed in range(1, 5):
        assert same_results(on_cuda(args, seed), first)
    if statistics != "tensor":
        gate = None if args.gate is None else args.gate[1:]
        alone = on_cuda(args._replace(x=args.x[1:], gate=gate))
        half = len(first[1]) // 2
        assert same_results(alone, (first[0][1:], first[1][half:], first[2][half:]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("chain", ["norm", "gelu"])
@pytest.mark.parametrize("statistics", ["sample", "token"])
def test_what_is_not_finite_gives_nan_in_its_group_only(
    statistics: str, chain: str, bad: float
) -> None:
    args = chain_arguments(torch.randn(3, 4, 5, 6), -1, statistics, **CHAINS[chain])
    clean = on_cuda(args)
    args.x[1, 2, 3, 4] = bad
    found = on_cuda(args)
    at = 1 if statistics == "sample" else 20 + 2 * 5 + 3
    others = torch.arange(args.groups) != at
    for got, before in zip(found[1:], clean[1:], strict=True):
        assert got[at].isnan() and torch.equal(got[others], before[others])
    codes, before = (t[0].reshape(args.groups, -1) for t in (found, clean))
    assert torch.equal(codes[others], before[others])


@ways
def test_pairs_of_floats_find_the_grid_of_doubles(layout: str, statistics: str) -> None:
    """Codes differ only at a rounding boundary, where sums are made of pairs of floats."""
    last = layout == "last"
    for x in views((2, 30, 13, 17), last).values():
        args = chain_arguments(x, -1 if last else -3, statistics, **CHAINS["norm, gate"])
        codes, step, shift = launch_chain_quantize(Variant(FLOAT_PAIRS), *args)
        wanted, want_step, want_shift = on_cpu(args)
        exact = ChainArgs(*(a.double() if isinstance(a, Tensor) else a for a in args))
        bound = chain_grid(exact)
        assert ((step - want_step).abs() <= bound).all()
        assert ((shift - want_shift).abs() <= bound).all()
        y = chain_values(exact)
        rows = y.reshape(step.numel(), -1)
        t = ((rows + want_shift[:, None]) / want_step[:, None]).reshape(y.shape)
        near = ((t - t.floor()) - 0.5).abs() < BOUNDARY_STEPS
        assert not ((codes != wanted) & ~near).any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_and_empty_tensors_run_the_reference(dtype: torch.dtype) -> None:
    launch = HostLauncher()
    for x in (torch.randn(2, 5, 7).to(dtype), torch.zeros(2, 0)):
        args = chain_arguments(x, -1, "sample", activation="silu", offset=False)
        assert same_results(launch_chain_quantize(launch, *args), chain_quantize_ref(*args))
    assert launch.launched == []


MOMENT_WAYS = [way for way in WAYS if way[1] != "token"]
moment_ways = pytest.mark.parametrize(("layout", "statistics"), MOMENT_WAYS)


def with_moments(args: ChainArgs, extra: int = 0) -> ChainArgs:
    """The same with the statistics of its channels, among `extra` others where there are some."""
    offset = args.offset
    found = moments_ref(args.x, None if offset is None else offset.reshape(-1), args.dim)
    if not extra:
        return args._replace(moments=found)
    samples, channels, _ = found.shape
    order = torch.randperm(channels + extra, generator=torch.Generator().manual_seed(extra))
    all_of_them = torch.randn(samples, channels + extra, 4).double()
    all_of_them[:, order[:channels]] = found
    return args._replace(moments=all_of_them, moments_channels=order[:channels])


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("extra", [0, 5])
@moment_ways
def test_codes_from_moments_are_those_of_the_cpu(layout: str, statistics: str, extra: int) -> None:
    """Step and shift in the bytes of the CPU kernel, which adds up in the same order."""
    last = layout == "last"
    for seed, size in enumerate([*SIZES, (2, 5, 41, 43)]):
        for name, x in views(size, last).items():
            for chain in (PLAIN, {}):
                plain = chain_arguments(x, -1 if last else -3, statistics, **chain)
                args = with_moments(plain, extra)
                found = on_cuda(args, seed)
                assert same_results(found, on_cpu(args)), (size, name)


@pytest.mark.parametrize("channels", [127, 128, 129, 300])
@pytest.mark.parametrize("statistics", ["sample", "tensor"])
def test_moments_of_many_channels(statistics: str, channels: int) -> None:
    args = with_moments(chain_arguments(torch.randn(3, 4, channels) + 1, -1, statistics), 7)
    first = on_cuda(args)
    assert same_results(first, on_cpu(args))
    for seed in range(1, 4):
        assert same_results(on_cuda(args, seed), first)


@pytest.mark.parametrize("grid", [*DLS_RANGES, (0, 255)], ids=str)
@moment_ways
def test_ranges_and_the_cap_with_moments(
    layout: str, statistics: str, grid: tuple[int, int]
) -> None:
    dim = -1 if layout == "last" else -3
    for x in (torch.randn(2, 6, 5, 8), torch.randn(2, 6, 8, 5).transpose(2, 3).permute(0, 2, 1, 3)):
        for cap in (False, True):
            args = with_moments(chain_arguments(x, dim, statistics, grid=grid))._replace(cap=cap)
            assert same_results(on_cuda(args, 6), on_cpu(args))


def test_with_moments_a_tensor_is_read_once() -> None:
    x = torch.randn(2, 6, 5, 8)
    turned = x.permute(0, 3, 1, 2)
    for args, codes in (
        (chain_arguments(x, -1, "sample"), "qmir_chain_codes"),
        (chain_arguments(x[:, 2:4], -3, "tensor"), "qmir_chain_codes"),
        (chain_arguments(turned, -3, "sample"), "qmir_chain_tile_codes"),
    ):
        assert kernels(with_moments(args)) == ["qmir_moments_steps", codes]


@pytest.mark.parametrize("channel", [-1, 11, 2**40, -(2**62)])
def test_a_channel_that_is_none_gives_nan(channel: int) -> None:
    args = with_moments(chain_arguments(torch.randn(3, 4, 6), -1, "sample"), 5)
    assert args.moments_channels is not None
    for at in (0, 3, 5):
        chosen = args.moments_channels.clone()
        chosen[at] = channel
        _, step, shift = on_cuda(args._replace(moments_channels=chosen))
        assert step.isnan().all() and shift.isnan().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@moment_ways
def test_moments_that_are_not_finite_give_nan_in_their_group(
    layout: str, statistics: str, bad: float
) -> None:
    dim = -1 if layout == "last" else -3
    x = torch.randn(3, 4, 5, 6)
    clean = on_cuda(with_moments(chain_arguments(x, dim, statistics)))
    x[1, 2, 3, 4] = bad
    found = on_cuda(with_moments(chain_arguments(x, dim, statistics)))
    if statistics == "tensor":
        assert found[1].isnan().all() and found[2].isnan().all()
        return
    assert found[1][1].isnan() and found[2][1].isnan()
    for got, before in zip(found, clean, strict=True):
        assert torch.equal(got[::2], before[::2])


MOMENT_FAULTS = {
    "channel": ("moments", "channels[i % chosen] : i", "i % chosen : i"),
    "sample": ("moments", "(group * samples + i / chosen)", "(group * samples)"),
    "share of a channel": ("moments", "(double)count / (double)all", "(double)count / samples"),
    "first barrier": (
        "moments",
        "one.squares;\n    }\n    __syncthreads();",
        "one.squares;\n    }",
    ),
    "second barrier": ("moments", "[i];\n    __syncthreads();\n  }\n  if", "[i];\n  }\n  if"),
    "group": ("chain_quantize", "/ pixels / samples;", "/ pixels;"),
    "grid": ("chain_quantize", "code_of(tile.row(row)[c], grids[row]);\n  });\n}", "grids[0]"),
}


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("fault", MOMENT_FAULTS)
def test_a_wrong_kernel_of_moments_is_noticed(fault: str, tmp_path: Path) -> None:
    source, right, wrong = MOMENT_FAULTS[fault]
    if fault == "grid":
        wrong = right.replace("grids[row]", wrong)
    other = {"moments": "chain_quantize", "chain_quantize": "moments"}[source]
    folder = with_fault(tmp_path, source, right, wrong, other)
    # Samples of different ranges, several of them in a tile; more channels than threads.
    x = torch.randn(6, 5, 150) * torch.arange(1, 7)[:, None, None]
    statistics = "tensor" if fault in ("sample", "group", "share of a channel") else "sample"
    args = with_moments(chain_arguments(x.transpose(1, 2), -2, statistics), 5)
    wanted = on_cpu(args)
    assert same_results(on_cuda(args), wanted)

    def differs(seed: int) -> bool:
        try:
            return not same_results(on_cuda(args, seed, folder), wanted)
        except HostKernelError:
            return True

    assert any(differs(seed) for seed in range(8))


FAULTS = {
    "pivot of the norm": ("tile.channels, x[0], sum, squares);", "x[0]", "x[1]"),
    "bias of the norm": ("weight[channel], bias[channel])", "bias[channel]", "bias[0]"),
    "gate's row": ("rows.gate[row] + channel", "rows.gate[row]", "rows.gate[0]"),
    "shift's channel": ("y = y + offset[channel];", "[channel]", "[channel / 2]"),
    "sum without epsilon": ("sqrt(variance + eps)", "variance + eps", "variance"),
    "channels of a tile": ("blockIdx.x % tiles * width;", "width", "(width + 1)"),
}


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_kernel_is_noticed(fault: str, tmp_path: Path) -> None:
    right, part, other = FAULTS[fault]
    folder = with_fault(tmp_path, "chain_quantize", right, right.replace(part, other), "dls")
    x = views((2, 72, 9, 11), False)["channels last"] * 1e-3 + 3.0
    chain = {"gate": True} if fault == "channels of a tile" else CHAINS["norm, gate"]
    args = chain_arguments(x, -3, "sample", **chain)
    assert same_results(on_cuda(args), on_cpu(args))
    try:
        got = on_cuda(args, 0, folder)
    except HostKernelError:
        return
    assert not same_results(got, on_cpu(args))


BARRIERS = {
    "before the values": "  __syncthreads();\n  if (norm) {",
    "after the norm": "    });\n    __syncthreads();\n  }\n  const bool columns",
    "after the values": "channel);\n  });\n  __syncthreads();\n}",
}


@pytest.mark.parametrize("barrier", BARRIERS)
def test_a_missing_barrier_is_noticed(barrier: str, tmp_path: Path) -> None:
    right = BARRIERS[barrier]
    wrong = right.replace("__syncthreads();", "")
    folder = with_fault(tmp_path, "chain_quantize", right, wrong)
    args = chain_arguments(torch.randn(1, 40, 24), -1, "token", **CHAINS["norm, gate"])
    wanted = on_cpu(args)

    def differs(seed: int) -> bool:
        try:
            return not same_results(on_cuda(args, seed, folder), wanted)
        except HostKernelError:
            return True

    assert any(differs(seed) for seed in range(8))


def test_bad_arguments_are_refused() -> None:
    args = chain_arguments(torch.randn(2, 4, 5), -1, "sample")
    with pytest.raises(RuntimeError, match="activations are none"):
        on_cuda(args._replace(activation="swish"))
    with pytest.raises(RuntimeError, match="statistics must be"):
        on_cuda(args._replace(statistics="token", dim=-2))
