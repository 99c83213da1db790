"""Residual and ReLU behind qmir::linear and qmir::conv2d: the bytes of separate operators."""

import pytest
import torch
from support.convolutions import NAMED, operands
from support.epilogues import END, LAYOUTS, ending, same_values, separate
from support.integers import linear_operands, same_bytes, with_threads

import qmir_ao.backend.cpu.conv2d
import qmir_ao.backend.cpu.linear  # noqa: F401  (register the kernels)
from qmir_ao.ops.conv2d import conv2d, conv2d_ref
from qmir_ao.ops.linear import linear, linear_ref

LINEAR, CONV2D = torch.ops.qmir.linear, torch.ops.qmir.conv2d
ends = pytest.mark.parametrize("name", END)
forms = pytest.mark.parametrize("reference", [False, True], ids=["kernel", "reference"])
ROWS = {
    "tokens": (2, 35, 60, 66),
    "odd": (3, 7, 13, 5),
    "one": (1, 1, 1, 1),
    "wide": (1, 50, 3, 97),
}
"""Samples, rows, inputs, features."""
CASES = ("body-3x3", "pointwise", "depthwise", "depthwise-7x7", "stride-2-wide", "wide-image")


@pytest.mark.usefixtures("poisoned_empty")
@forms
@ends
@pytest.mark.parametrize("each_row", [False, True])
@pytest.mark.parametrize("sizes", ROWS.values(), ids=ROWS)
def test_linear_gives_the_bytes_of_separate_operators(
    sizes: tuple[int, int, int, int], each_row: bool, name: str, reference: bool
) -> None:
    samples, rows, inputs, features = sizes
    shape = (samples * rows, inputs) if each_row else (samples, rows, inputs)
    args, _ = linear_operands(3, shape, features, 4, True, True)
    plain = linear_ref(*args)
    end = ending(1, name, plain.shape, features)
    got = (linear_ref if reference else LINEAR)(*args, *end)
    assert same_values(got, separate(plain, end, (-1,)))
    assert got.is_contiguous()


@pytest.mark.usefixtures("poisoned_empty")
@forms
@ends
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_conv2d_gives_the_bytes_of_separate_operators(
    case: str, layout: str, name: str, reference: bool
) -> None:
    args, weight = operands(5, NAMED[case], 4)
    plain = conv2d_ref(*args)
    end = ending(2, name, plain.shape, weight.shape[0])
    if end.residual is not None:
        end = end._replace(residual=LAYOUTS[layout](end.residual))
    got = (conv2d_ref if reference else CONV2D)(*args, *end)
    assert same_values(got, separate(plain, end, (-1, 1, 1)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_convolution_lies_as_its_residual_does(layout: str) -> None:
    args, _ = operands(5, NAMED["body-3x3"], 4)
    plain = conv2d_ref(*args)
    residual = LAYOUTS[layout](torch.randn(plain.shape))
    last = layout in ("channels last", "half of the channels")
    for form in (CONV2D, conv2d_ref):
        y = form(*args, residual)
        assert y.is_contiguous(memory_format=torch.channels_last) is last
        assert y.is_contiguous() is not last


@pytest.mark.parametrize("residual", [-1.0, 1.0])
def test_zeros_keep_their_sign_as_torch_keeps_it(residual: float) -> None:
    """A sum that is -0.0, or nearly, before the activation."""
    args, _ = linear_operands(2, (4, 6), 5, 8, False, False)
    zero = (torch.zeros_like(args[0]), *args[1:2], torch.zeros_like(args[2]), *args[3:6], None)
    other = torch.full((4, 5), residual) * torch.tensor([0.0, 1e-45, 1e-38, 1.0, 3e38])
    plain = linear_ref(*zero, *args[7:])
    for form in (LINEAR, linear_ref):
        got = form(*zero, *args[7:], other, None, "relu")
        assert same_bytes(got, torch.relu(other + plain))


def test_threads_and_batch_mates_do_not_matter() -> None:
    args, _ = operands(5, NAMED["body-3x3"]._replace(batch=3), 4)
    residual, scale = torch.randn(3, 60, 9, 13), torch.randn(60)
    residual = residual.contiguous(memory_format=torch.channels_last)
    single = with_threads(1, lambda: CONV2D(*args, residual, scale, "relu"))
    assert same_bytes(with_threads(2, lambda: CONV2D(*args, residual, scale, "relu")), single)
    for i in range(3):
        alone = (args[0][i : i + 1], args[1][i : i + 1], args[2][i : i + 1], *args[3:])
        mine = CONV2D(*alone, residual[i : i + 1], scale, "relu")
        assert same_bytes(mine, single[i : i + 1])


@pytest.mark.parametrize("part", ["residual", "residual_scale", "activation"])
def test_every_part_is_used(part: str) -> None:
    """A wrong element of an operand changes the results it belongs to, and no other."""
    args, _ = linear_operands(1, (2, 9, 10), 7, 4, True, True)
    end = ending(4, "all", torch.Size((2, 9, 7)), 7)
    clean = LINEAR(*args, end.residual, end.residual_scale, "none")
    residual, scale = end.residual.clone(), end.residual_scale.clone()
    if part == "residual":
        residual[1, 3, 2] += 1.0
        assert (LINEAR(*args, residual, scale) != clean)[1].nonzero().tolist() == [[3, 2]]
    elif part == "residual_scale":
        scale[4] *= 2.0
        changed = (LINEAR(*args, residual, scale) != clean) & ~clean.isnan()
        assert changed.flatten(0, 1).any(0).nonzero().flatten().tolist() == [4]
    else:
        assert (clean < 0).any() and not (LINEAR(*args, residual, scale, "relu") < 0).any()


def test_an_empty_batch_and_the_typed_forms() -> None:
    args, _ = linear_operands(1, (2, 9, 10), 7, 4, False, True)
    assert LINEAR(args[0][:0], *args[1:], torch.zeros(0, 9, 7)).shape == (0, 9, 7)
    end = ending(4, "all", torch.Size((2, 9, 7)), 7)
    wanted = LINEAR(*args, *end)
    assert same_bytes(linear(*args[:7], bits=4, out_features=7, **end._asdict()), wanted)
    case = NAMED["body-3x3"]
    conv, _ = operands(5, case, 4)
    end = ending(4, "all", conv2d_ref(*conv).shape, 60)
    bits, size, stride, padding, dilation, groups = case.geometry(4)
    typed = conv2d(
        *conv[:8], bits=bits, weight_size=size, stride=stride, padding=padding,
        dilation=dilation, groups=groups, **end._asdict(),
    )  # fmt: skip
    assert same_bytes(typed, CONV2D(*conv, *end))


def test_export_with_a_dynamic_size() -> None:
    args, _ = operands(5, NAMED["body-3x3"], 4)

    class Layer(torch.nn.Module):
        def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
            return CONV2D(x, *args[1:], residual, None, "relu")

    rows, columns = torch.export.Dim("rows", min=4), torch.export.Dim("columns", min=4)
    shapes = ({2: rows, 3: columns}, {2: rows, 3: columns})
    residual = torch.randn(2, 60, 9, 13)
    program = torch.export.export(Layer(), (args[0], residual), dynamic_shapes=shapes)
    x, residual = args[0][:, :, :5, :7], torch.randn(2, 60, 5, 7)
    assert same_bytes(program.module()(x, residual), CONV2D(x, *args[1:], residual, None, "relu"))


@pytest.mark.parametrize(
    ("end", "message"),
    [
        ((torch.zeros(2, 3, 5),), r"residual must be float32 of the result's shape \(2, 3, 6\)"),
        ((torch.zeros(6),), r"residual must be float32 of the result's shape.*got \(6,\)"),
        ((torch.zeros(2, 3, 6, dtype=torch.float64),), "residual must be float32.*float64"),
        ((None, torch.zeros(6)), "residual_scale must be float32 of 6 values.*without one"),
        ((torch.zeros(2, 3, 6), torch.zeros(1)), r"of 6 values.*got \(1,\)"),
        ((torch.zeros(2, 3, 6), torch.zeros(6, dtype=torch.float64)), "of 6 values.*float64"),
        ((None, None, "tanh"), "activation must be one of none, relu, .*got 'tanh'"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_bad_epilogues_are_refused(end: tuple, message: str) -> None:
    args, _ = linear_operands(1, (2, 3, 10), 6, 4, True, True)
    for form in (LINEAR, linear_ref):
        with pytest.raises(RuntimeError, match=message):
            form(*args, *end)


def test_a_bad_residual_of_a_convolution_is_refused() -> None:
    args, _ = operands(5, NAMED["body-3x3"], 4)
    for form in (CONV2D, conv2d_ref):
        with pytest.raises(RuntimeError, match=r"result's shape \(2, 60, 9, 13\), got \(2, 60, 1"):
            form(*args, torch.zeros(2, 60, 1, 1))
