"""Statistics that integer operators find of their results, and quantizers that start from them."""

import pytest
import torch
from support.convolutions import NAMED, operands
from support.epilogues import LAYOUTS
from support.integers import linear_operands, same_bytes, with_threads
from support.scans_q import IMAGES, image_operands
from support.tolerances import MOMENTS
from torch import Tensor

import qmir_ao.backend.cpu.chain_quantize
import qmir_ao.backend.cpu.conv2d
import qmir_ao.backend.cpu.linear
import qmir_ao.backend.cpu.ss2d_scan_q  # noqa: F401  (register the kernels)
from qmir_ao.errors import NonFiniteError
from qmir_ao.ops._activations import ACTIVATIONS, EXACT
from qmir_ao.ops.chain_quantize import chain_quantize_ref
from qmir_ao.ops.conv2d import conv2d_moments_ref
from qmir_ao.ops.linear import linear_moments_ref
from qmir_ao.ops.ss2d_scan_q import ss2d_scan_q_moments_ref

qmir = torch.ops.qmir
LINEAR, CONV2D, CHAIN = qmir.linear_moments, qmir.conv2d_moments, qmir.chain_quantize
forms = pytest.mark.parametrize("reference", [False, True], ids=["kernel", "reference"])
ROWS = {
    "tokens": ((2, 35, 60), 66),
    "image": ((3, 7, 5, 12), 5),
    "many": ((1, 500, 33), 40),
    "vectors": ((4, 16), 9),
    "one": ((1, 1, 1), 1),
    "a vector": ((16,), 9),
}
"""Shape of x, features."""
CASES = (
    "body-3x3", "wide-image", "stride-2-wide", "pointwise", "pointwise-padded", "depthwise",
    "depthwise-7x7", "depthwise-tall", "kernel-larger-than-image",
)  # fmt: skip
W, V = torch.tensor([0.11, 0.37, -0.09, 0.12]), torch.tensor([-0.91, 0.13, 0.08, 0.21])


def linear_case(name: str) -> tuple:
    shape, features = ROWS[name]
    return linear_operands(3, shape, features, 4, len(shape) > 1, True)[0]


def oracle(y: Tensor, offset: Tensor | None, dim: int) -> tuple[Tensor, Tensor]:
    """Moments by numpy's plain definitions in float64, and the magnitudes that their sums add."""
    y = y if y.dim() > 1 else y.unsqueeze(0)
    z = y.movedim(dim, 1).reshape(y.shape[0], y.shape[dim], -1)
    z = z if offset is None else z + offset.reshape(-1, 1)
    wide = z.double().numpy()
    mean = wide.mean(-1, keepdims=True)
    squares = ((wide - mean) ** 2).sum(-1)
    found = [mean[..., 0], squares, wide.min(-1), wide.max(-1)]
    about = abs(wide - wide[..., :1])
    terms = [about.mean(-1) + abs(mean[..., 0]), (about**2).sum(-1)]
    return (
        torch.stack([torch.from_numpy(v) for v in found], -1),
        torch.stack([torch.from_numpy(v) for v in terms], -1),
    )


def check(moments: Tensor, y: Tensor, offset: Tensor | None, dim: int) -> None:
    want, terms = oracle(y, offset, dim)
    assert moments.dtype == torch.float64
    assert moments.shape == want.shape
    assert torch.equal(moments[..., 2:], want[..., 2:])
    assert ((moments - want)[..., :2].abs() <= MOMENTS * terms).all()


@pytest.mark.usefixtures("poisoned_empty")
@forms
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("name", ROWS)
def test_linear_moments_are_accurate(name: str, shifted: bool, reference: bool) -> None:
    args = linear_case(name)
    offset = torch.randn(ROWS[name][1]) if shifted else None
    plain = (None, None, "none")
    y, moments = (linear_moments_ref if reference else LINEAR)(*args, *plain, offset)
    assert same_bytes(y, qmir.linear(*args))
    check(moments, y, offset, -1)


@pytest.mark.usefixtures("poisoned_empty")
@forms
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_conv2d_moments_are_accurate(name: str, shifted: bool, reference: bool) -> None:
    args, weight = operands(5, NAMED[name], 4)
    offset = torch.randn(weight.shape[0]) if shifted else None
    plain = (None, None, "none")
    y, moments = (conv2d_moments_ref if reference else CONV2D)(*args, *plain, offset)
    assert same_bytes(y, qmir.conv2d(*args))
    check(moments, y, offset, 1)


@pytest.mark.usefixtures("poisoned_empty")
@forms
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("name", IMAGES)
def test_moments_of_a_scan_are_accurate(name: str, shifted: bool, reference: bool) -> None:
    args = image_operands(3, IMAGES[name], 4)
    offset = torch.randn(IMAGES[name][1]) if shifted else None
    y, moments = (ss2d_scan_q_moments_ref if reference else qmir.ss2d_scan_q_moments)(*args, offset)
    assert same_bytes(y, qmir.ss2d_scan_q(*args))
    check(moments, y, offset, 1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_moments_are_of_what_the_epilogue_leaves(layout: str) -> None:
    args, weight = operands(5, NAMED["body-3x3"], 4)
    residual = LAYOUTS[layout](torch.randn(qmir.conv2d(*args).shape))
    end = (residual, torch.randn(weight.shape[0]), "gelu")
    y, moments = CONV2D(*args, *end)
    assert same_bytes(y, qmir.conv2d(*args, *end))
    check(moments, y, None, 1)


@pytest.mark.parametrize("name", [n for n in ACTIVATIONS if n not in EXACT])
def test_activations_of_an_epilogue_give_the_bytes_of_a_chain(name: str) -> None:
    """One formula for both: what is quantized does not depend on where it was activated."""
    args, _ = operands(5, NAMED["depthwise"], 4)
    plain, active = qmir.conv2d(*args), qmir.conv2d(*args, None, None, name)
    settings = (W, V, -1, -8, 7, "sample", False)
    before = CHAIN(plain, None, None, None, name, None, "none", None, *settings)
    behind = CHAIN(active, None, None, None, "none", None, "none", None, *settings)
    assert all(same_bytes(a, b) for a, b in zip(before, behind, strict=True))
    torch.testing.assert_close(active, ACTIVATIONS[name](plain), rtol=2e-6, atol=2e-6)
    rows = linear_case("tokens")
    torch.testing.assert_close(
        qmir.linear(*rows, None, None, name),
        ACTIVATIONS[name](qmir.linear(*rows)),
        rtol=2e-6,
        atol=2e-6,
    )


@pytest.mark.parametrize("name", ["many", "tokens"])
def test_linear_moments_are_equal_bytes_for_any_threads_and_batch(name: str) -> None:
    args = linear_case(name)
    one = with_threads(1, lambda: LINEAR(*args)[1])
    assert same_bytes(one, with_threads(3, lambda: LINEAR(*args)[1]))
    for i in range(one.shape[0]):
        steps = (t if t.numel() == 1 else t[i : i + 1] for t in args[1:3])
        alone = LINEAR(args[0][i : i + 1], *steps, *args[3:])[1]
        assert same_bytes(alone, one[i : i + 1])


@pytest.mark.parametrize("name", ["wide-image", "pointwise", "depthwise-tall"])
def test_conv2d_moments_are_equal_bytes_for_any_threads_and_batch(name: str) -> None:
    args, _ = operands(5, NAMED[name], 4)
    one = with_threads(1, lambda: CONV2D(*args)[1])
    assert same_bytes(one, with_threads(3, lambda: CONV2D(*args)[1]))
    for i in range(one.shape[0]):
        steps = (t if t.numel() == 1 else t[i : i + 1] for t in args[1:3])
        assert same_bytes(CONV2D(args[0][i : i + 1], *steps, *args[3:])[1], one[i : i + 1])


def test_a_constant_channel_has_no_spread() -> None:
    args, weight = operands(5, NAMED["pointwise"], 4)
    still = (torch.zeros_like(args[0]), *args[1:])
    y, moments = CONV2D(*still, None, None, "none", torch.full((weight.shape[0],), 0.1))
    assert (y == y[..., :1, :1]).all()
    assert (moments[..., 1] == 0).all()
    assert (moments[..., 0] == moments[..., 2]).all()


@forms
@pytest.mark.parametrize("statistics", ["sample", "tensor"])
@pytest.mark.parametrize("chosen", [None, [4], [7, 2, 5]], ids=str)
def test_a_quantizer_starts_from_moments(
    chosen: list[int] | None, statistics: str, reference: bool
) -> None:
    args, weight = operands(5, NAMED["depthwise"], 4)
    shift = torch.randn(weight.shape[0])
    y, moments = CONV2D(*args, None, None, "none", shift)
    channels = None if chosen is None else torch.tensor(chosen)
    x, offset = (y, shift) if channels is None else (y[:, channels], shift[channels])
    settings = (None, None, None, "none", None, "none", offset, W, V, -3, -8, 7, statistics, False)
    want = CHAIN(x, *settings)
    got = (chain_quantize_ref if reference else CHAIN)(x, *settings, moments, channels)
    for mine, theirs in zip(got[1:], want[1:], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2.0**-23, atol=0)
    exact = qmir.dls_quantize(x + offset.reshape(-1, 1, 1), *got[1:], -8, 7)
    assert torch.equal(got[0], exact)


def test_other_moments_give_another_step() -> None:
    """The values themselves are not read for a step."""
    args, _ = operands(5, NAMED["pointwise"], 4)
    y, moments = CONV2D(*args)
    settings = (None, None, None, "none", None, "none", None, W, V, -1, -8, 7, "sample", False)
    wide = moments.clone()
    wide[..., 1] *= 4.0
    step, wider = (CHAIN(y, *settings, m, None)[1] for m in (moments, wide))
    assert (step != wider).all()


@forms
def test_what_is_not_finite_is_refused(reference: bool) -> None:
    args, _ = operands(5, NAMED["body-3x3"], 4)
    broken = (args[0], torch.full_like(args[1], float("nan")), *args[2:])
    y, moments = CONV2D(*broken)
    settings = (None, None, None, "none", None, "none", None, W, V, -1, -8, 7, "sample", False)
    with pytest.raises(NonFiniteError, match="sample"):
        (chain_quantize_ref if reference else CHAIN)(y, *settings, moments, None)


@forms
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"statistics": "token"}, "moments are those of x and its offset"),
        ({"activation": "gelu"}, "moments are those of x and its offset"),
        ({"moments": torch.zeros(2, 6, 4)}, "moments must be float64"),
        ({"moments": torch.zeros(3, 6, 4, dtype=torch.float64)}, r"moments must be float64 \(2, O"),
        ({"moments": torch.zeros(2, 6, 3, dtype=torch.float64)}, r"moments must be float64 \(2, O"),
        ({"channels": torch.tensor([0, 1], dtype=torch.int32)}, "moments_channels must be int64"),
        ({"channels": torch.zeros(0, dtype=torch.int64)}, "moments_channels must be int64"),
        ({"channels": torch.tensor([0, 6])}, "index|moments_channels must be channels"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_what_does_not_fit_is_refused(change: dict, message: str, reference: bool) -> None:
    given = {
        "moments": torch.rand(2, 6, 4, dtype=torch.float64),
        "channels": None,
        "activation": "none",
        "statistics": "sample",
    } | change
    chain = (None, None, None, given["activation"], None, "none", None, W, V, -1, -8, 7)
    form = chain_quantize_ref if reference else CHAIN
    with pytest.raises((RuntimeError, IndexError), match=message):
        form(
            torch.randn(2, 6, 5), *chain, given["statistics"], False, given["moments"],
            given["channels"],
        )  # fmt: skip


@forms
def test_bad_offsets_and_empty_results_are_refused(reference: bool) -> None:
    args = linear_case("tokens")
    form = linear_moments_ref if reference else LINEAR
    for offset in (torch.zeros(65), torch.zeros(66, dtype=torch.float64)):
        with pytest.raises(RuntimeError, match="moments_offset must be float32 of 66 values"):
            form(*args, None, None, "none", offset)
    nothing = (args[0][:, :0], *args[1:])
    with pytest.raises(RuntimeError, match="holds nothing and has no moments"):
        form(*nothing)
