"""Integer kernels on a real GPU: the bytes of the references, or of the CPU kernels."""

from typing import Any

import pytest
import torch

pytest.importorskip("hypothesis", reason="the operands are drawn by modules that need it")

from support.cases import DLS_RANGES, DLS_SHAPES, DLS_V, DLS_W, dls_case
from support.chain_cases import CHAINS, chain_arguments, same_results, views
from support.convolutions import NAMED, offsets, operands
from support.epilogues import END, LAYOUTS, ending, same_values
from support.gpu import moved, needs_gpu
from support.integers import linear_operands, same_bytes
from support.moments import assert_moments
from support.scans_q import IMAGES, image_operands
from support.tolerances import BOUNDARY_STEPS, PAIR_STATISTIC, chain_grid

import qmir_ao.backend.kernels  # noqa: F401  (registers the kernels)
from qmir_ao.ops._activations import ACTIVATIONS, EXACT
from qmir_ao.ops._moments import moments_ref
from qmir_ao.ops.chain_quantize import STATISTICS, ChainArgs, chain_values
from qmir_ao.ops.conv2d import conv2d_acc_ref, conv2d_ref
from qmir_ao.ops.linear import linear_acc_ref, linear_ref
from qmir_ao.ops.pack import pack_ref

pytestmark = [pytest.mark.gpu, needs_gpu]
QMIR = torch.ops.qmir
NO_END = (None, None, "none")
"""An epilogue that changes nothing."""


def adds_doubles() -> bool:
    """Whether kernels add up in double arithmetic here."""
    return torch.cuda.get_device_capability() in ((8, 0), (9, 0), (10, 0))


def same(operator: Any, reference: Any, args: tuple) -> bool:
    return same_bytes(operator(*moved(args, "cuda")).cpu(), reference(*args))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("name", NAMED)
def test_conv2d(name: str, bits: int) -> None:
    case = NAMED[name]
    args, _ = operands(11, case, bits, x_offset=offsets(11, case, "ordinary", False))
    for x in (args[0], args[0].clamp(-8, 7)):
        assert same(QMIR.conv2d, conv2d_ref, (x, *args[1:]))
        assert same(QMIR.conv2d_acc, conv2d_acc_ref, (x, args[3], *args[8:]))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(
    "size", [(1, 1, 1), (70, 60, 66), (4096, 60, 144), (333, 360, 180)], ids=str
)
def test_linear(size: tuple[int, int, int], bits: int) -> None:
    rows, inputs, features = size
    for shape, per_sample in (((rows, inputs), True), ((2, rows, inputs), False)):
        args, _ = linear_operands(7, shape, features, bits, per_sample, True)
        for x in (args[0], args[0].clamp(-8, 7)):
            assert same(QMIR.linear, linear_ref, (x, *args[1:]))
            assert same(QMIR.linear_acc, linear_acc_ref, (x, args[3], bits, features))


@pytest.mark.parametrize("end", END)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["body-3x3", "pointwise", "depthwise"])
def test_residuals_and_activations(name: str, layout: str, end: str) -> None:
    args, weight = operands(11, NAMED[name], 4)
    epilogue = ending(1, end, conv2d_ref(*args).shape, weight.shape[0])
    if epilogue.residual is not None:
        epilogue = epilogue._replace(residual=LAYOUTS[layout](epilogue.residual))
    wanted = conv2d_ref(*args, *epilogue)
    got = QMIR.conv2d(*moved((*args, *epilogue), "cuda"))
    assert same_values(got.cpu(), wanted) and got.stride() == wanted.stride()
    rows, _ = linear_operands(7, (70, 60), 66, 4, True, True)
    epilogue = ending(1, end, torch.Size((70, 66)), 66)
    got = QMIR.linear(*moved((*rows, *epilogue), "cuda"))
    assert same_values(got.cpu(), linear_ref(*rows, *epilogue))


@pytest.mark.parametrize("activation", [a for a in ACTIVATIONS if a not in EXACT])
@pytest.mark.parametrize("layout", ["rows", "channels last"])
@pytest.mark.parametrize("name", ["body-3x3", "pointwise", "depthwise"])
def test_other_activations(name: str, layout: str, activation: str) -> None:
    """The bytes of the CPU kernels."""
    args, weight = operands(11, NAMED[name], 4)
    end = ending(1, "all", conv2d_ref(*args).shape, weight.shape[0])
    end = end._replace(residual=LAYOUTS[layout](end.residual), activation=activation)
    got = QMIR.conv2d(*moved((*args, *end), "cuda"))
    assert same_values(got.cpu(), QMIR.conv2d(*args, *end))
    rows, _ = linear_operands(7, (70, 60), 66, 4, True, True)
    end = ending(1, "all", torch.Size((70, 66)), 66)._replace(activation=activation)
    got = QMIR.linear(*moved((*rows, *end), "cuda"))
    assert same_values(got.cpu(), QMIR.linear(*rows, *end))


def assert_moments_beside(
    operator: Any, plain: Any, args: tuple, offset: Any, dim: int, end: tuple = NO_END
) -> None:
    """Results as without moments, moments of them, and the same bytes in a second run."""
    given = moved((*args, *end, offset), "cuda")
    y, found = (t.cpu() for t in operator(*given))
    assert same_bytes(y, plain(*moved(args, "cuda")).cpu())
    assert_moments(found, y, offset, dim, pairs=not adds_doubles())
    assert same_bytes(operator(*given)[1].cpu(), found)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("name", NAMED)
def test_conv2d_moments(name: str, bits: int) -> None:
    args, weight = operands(11, NAMED[name], bits)
    for offset in (None, torch.randn(weight.shape[0])):
        assert_moments_beside(QMIR.conv2d_moments, QMIR.conv2d, args, offset, 1)


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 70, 60), (2, 4, 16, 60), (9, 13), (2, 1500, 33)])
def test_linear_moments(shape: tuple[int, ...]) -> None:
    args, _ = linear_operands(7, shape, 66, 4, True, True)
    for offset in (None, torch.randn(66)):
        assert_moments_beside(QMIR.linear_moments, QMIR.linear, args, offset, -1)


@pytest.mark.parametrize("size", [*IMAGES.values(), (3, 18, 10, 61, 53)], ids=str)
def test_ss2d_scan_q_moments(size: tuple[int, ...]) -> None:
    args = image_operands(3, size, 4)
    for offset in (None, torch.randn(size[1])):
        operators = QMIR.ss2d_scan_q_moments, QMIR.ss2d_scan_q
        assert_moments_beside(*operators, tuple(args), offset, 1, end=())


@pytest.mark.parametrize("statistics", ["sample", "tensor"])
@pytest.mark.parametrize("size", [(3, 7, 9, 11), (2, 72, 17, 5), (1, 60, 128, 130)], ids=str)
def test_codes_from_moments(size: tuple[int, ...], statistics: str) -> None:
    """The CPU kernel's bytes: both add up the moments in the same order."""
    for last in (True, False):
        for x in views(size, last).values():
            dim = -1 if last else -3
            args = chain_arguments(x, dim, statistics)
            assert args.offset is not None
            moments = moments_ref(x, args.offset.reshape(-1), dim)
            for chosen in (None, torch.arange(size[1]).flip(0)):
                given = args._replace(
                    moments=moments if chosen is None else moments.flip(1), moments_channels=chosen
                )
                wanted = QMIR.chain_quantize(*given)
                found = moved(list(QMIR.chain_quantize(*moved(tuple(given), "cuda"))), "cpu")
                assert same_results(found, wanted)


def test_a_graph_captures_statistics_and_what_takes_them() -> None:
    args = moved(operands(11, NAMED["body-3x3"], 4)[0], "cuda")
    weights = moved([DLS_W, DLS_V], "cuda")

    def run() -> Any:
        y, moments = QMIR.conv2d_moments(*args)
        chain = (None, None, None, "none", None, "none", None, *weights, -3, -8, 7, "sample", False)
        return QMIR.chain_quantize(y, *chain, moments)

    before = run()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        codes = run()
    args[1].mul_(1.5)
    graph.replay()
    wanted = run()
    assert same_results(codes, wanted) and not torch.equal(codes[1], before[1])


@pytest.mark.parametrize("grid", DLS_RANGES, ids=str)
@pytest.mark.parametrize("shape", [*DLS_SHAPES, (4096, 60), (1, 66 * 4096 + 9)], ids=str)
def test_dls(shape: tuple[int, ...], grid: tuple[int, int]) -> None:
    x, _ = dls_case(shape)
    found = QMIR.dls_qparams(*moved((x, DLS_W, DLS_V), "cuda"), *grid, False, False)
    step, shift = moved(list(found), "cpu")
    # To the byte where doubles are fast, elsewhere but for a rounding of a statistic.
    wanted = QMIR.dls_qparams(x, DLS_W, DLS_V, *grid, False, False)
    most = x.abs().max() * (1.0 + DLS_V.abs().sum()) * (1.0 + DLS_W.abs().sum())
    for mine, theirs in zip((step, shift), wanted, strict=True):
        assert (mine - theirs).abs().max() <= PAIR_STATISTIC * most
    assert same(QMIR.dls_quantize, QMIR.dls_quantize, (x, step, shift, *grid))
    codes = QMIR.dls_quantize(x, step, shift, *grid)
    assert same(QMIR.dls_dequantize, QMIR.dls_dequantize, (codes, step, shift))
    for bits in (2, 4):
        assert same(QMIR.pack, pack_ref, (codes, bits))


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("statistics", STATISTICS)
@pytest.mark.parametrize("size", [(3, 7, 9, 11), (2, 72, 17, 5), (1, 60, 128, 130)], ids=str)
def test_chain_quantize(size: tuple[int, ...], statistics: str, chain: str) -> None:
    """The CPU kernel's bytes where doubles are fast, elsewhere codes but at boundaries."""
    exact = adds_doubles()
    for last in (True, False)[: 1 if statistics == "token" else 2]:
        for x in views(size, last).values():
            args = chain_arguments(x, -1 if last else -3, statistics, **CHAINS[chain])
            wanted = QMIR.chain_quantize(*args)
            found = moved(list(QMIR.chain_quantize(*moved(tuple(args), "cuda"))), "cpu")
            if exact:
                assert same_results(found, wanted)
            else:
                assert_near(args, found, wanted)


def assert_near(args: ChainArgs, found: Any, wanted: Any) -> None:
    wide = ChainArgs(*(a.double() if isinstance(a, torch.Tensor) else a for a in args))
    bound = chain_grid(wide)
    codes, step, shift = wanted
    assert ((found[1] - step).abs() <= bound).all() and ((found[2] - shift).abs() <= bound).all()
    y = chain_values(wide)
    t = (y.reshape(step.numel(), -1) + shift[:, None]) / step[:, None]
    near = (((t - t.floor()) - 0.5).abs() < BOUNDARY_STEPS).reshape(y.shape)
    assert not ((found[0] != codes) & ~near).any()
