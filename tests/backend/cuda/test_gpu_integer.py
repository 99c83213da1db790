"""Integer kernels on a real GPU: the bytes of the references."""

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
from support.tolerances import BOUNDARY_STEPS, PAIR_STATISTIC, chain_grid

import qmir_ao.backend.kernels  # noqa: F401  (registers the kernels)
from qmir_ao.ops.chain_quantize import STATISTICS, ChainArgs, chain_values
from qmir_ao.ops.conv2d import conv2d_acc_ref, conv2d_ref
from qmir_ao.ops.linear import linear_acc_ref, linear_ref
from qmir_ao.ops.pack import pack_ref

pytestmark = [pytest.mark.gpu, needs_gpu]
QMIR = torch.ops.qmir


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
    exact = torch.cuda.get_device_capability() in ((8, 0), (9, 0), (10, 0))
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
