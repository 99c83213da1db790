"""Networks of plain torch that nobody here designed: integers or float, and never a wrong answer.

A row says what runs on integer codes, and what stays in float and why, so that nothing slips to
float silently.
"""

import dataclasses
import functools
import itertools
from collections import Counter
from pathlib import Path

import pytest
import torch
from support.integers import same_bytes
from support.lowering import check_operators, pooled_psnr, psnr
from support.models import CAPTURES
from support.plain_habits import (
    AddsInPlace,
    Containers,
    Counts,
    DictOutput,
    InPlace,
    MixesImages,
    Norms,
    OddOperators,
    QuantizedTwice,
    Residual,
    Sequences,
    TupleOutput,
    TwoInputs,
)
from support.plain_networks import (
    Checkpointed,
    ComputedWeight,
    EinsumAttention,
    GroupedTransposed,
    MultiHead,
    Paddings,
    PadsOdd,
    RawParameters,
    SharedTwice,
    SkipUNet,
    TiedWeights,
)
from support.tolerances import CAPTURED_NETWORK, END_TO_END_PSNR
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves

import qmir_ao
from qmir_ao.backend.lowered import LoweredModule
from qmir_ao.errors import CaptureError, ConfigError
from qmir_ao.quant._bases import QmirFakeQuantize

FIRST = "the first convolution stays in float, as in the paper"
LAST = "the last convolution stays in float, as in the paper"
NORM = "normalization stays in float, as in the paper"
POINTWISE = "element-wise or pooling arithmetic stays in float"
UNQUANTIZED = "it has no quantizer"
COMPUTED = "its weight is computed from an input"
PADS = "the module pads by {!r} before it convolves; capture with example_inputs"
PARAMETRIZED = "its module is a ParametrizedConv1d; capture with example_inputs"


@dataclasses.dataclass(frozen=True)
class Row:
    """A network and what lowering makes of it.

    Attributes:
        build: makes the network.
        operators: kinds on integer codes, such as "linear*2 conv2d".
        floats: reason to operators in float, written the same way. A channel shift of a quantizer
            counts as "add". The first and the last convolution are understood.
        trace: what differs in a symbolic trace; None where it cannot trace the network.
        framed: whether the first and the last convolution stay in float, one of each.
    """

    build: type[nn.Module]
    operators: str
    floats: dict[str, str]
    trace: dict[str, str] | None = dataclasses.field(default_factory=dict)
    framed: bool = True


ROWS: dict[str, Row] = {
    "einsum attention": Row(
        EinsumAttention,
        "linear*2",
        {NORM: "layer_norm", POINTWISE: "add*3 mul softmax", UNQUANTIZED: "einsum*2"},
    ),
    "u-net": Row(
        SkipUNet,
        "conv2d*4",
        {POINTWISE: "add*5 gelu*2 leaky_relu*2 pad relu", UNQUANTIZED: "conv_transpose2d*2"},
    ),
    "grouped and transposed": Row(
        GroupedTransposed, "conv2d*2", {POINTWISE: "add*2 silu*2", UNQUANTIZED: "conv_transpose2d"}
    ),
    "shared": Row(SharedTwice, "conv2d*3 linear*2", {POINTWISE: "add*6 relu*2"}),
    "checkpoint": Row(Checkpointed, "conv2d*2", {POINTWISE: "add*3 gelu"}),
    "computed weight": Row(
        ComputedWeight,
        "conv2d*2 linear",
        {POINTWISE: "add*4 mean relu*2 softmax", COMPUTED: "conv2d"},
    ),
    "odd sizes": Row(PadsOdd, "conv2d linear", {POINTWISE: "add*2"}, trace=None),
    "tied weights": Row(TiedWeights, "linear*3", {POINTWISE: "add*4 tanh"}),
    "raw parameters": Row(
        RawParameters, "conv2d", {UNQUANTIZED: "einsum matmul", POINTWISE: "add*2 mul*3 sub"}
    ),
    "paddings": Row(
        Paddings,
        "conv2d*6",
        {POINTWISE: "add*7 pad*4 tanh*3"},
        trace={
            POINTWISE: "add*4 pad tanh*3",
            PADS.format("reflect"): "conv2d pad",
            PADS.format("replicate"): "conv2d pad",
            PADS.format("circular"): "conv2d pad",
            "operators": "conv2d*3",
        },
    ),
    "multi-head": Row(
        MultiHead,
        "linear*3",
        {POINTWISE: "add*5", UNQUANTIZED: "scaled_dot_product_attention*2"},
        trace=None,
    ),
    "in place": Row(InPlace, "conv2d*3", {POINTWISE: "add*5 fill mul relu"}, trace=None),
    "adds in place": Row(AddsInPlace, "conv2d*3", {POINTWISE: "add*5 relu silu"}),
    "residual": Row(Residual, "conv2d*2", {POINTWISE: "add*3 relu*2", NORM: "batch_norm*2"}),
    "mixes images": Row(MixesImages, "conv2d", {POINTWISE: "add mean sub"}),
    "odd operators": Row(
        OddOperators,
        "conv2d*2",
        {
            POINTWISE: "add*3 avg_pool2d fft_irfft2 fft_rfft2 gt*2 hardswish masked_fill "
            "max_pool2d mul*2 sort std upsample_bilinear2d where",
            UNQUANTIZED: "conv3d",
        },
    ),
    "norms": Row(
        Norms, "conv2d*2", {POINTWISE: "add*3 relu", NORM: "batch_norm group_norm instance_norm"}
    ),
    "quantized twice": Row(QuantizedTwice, "conv2d*4", {POINTWISE: "add*6 mul"}),
    "containers": Row(Containers, "conv2d*3", {POINTWISE: "add*3 mul*2 silu"}),
    "tuple": Row(TupleOutput, "conv2d*4", {POINTWISE: "add*4 mul*2 silu"}),
    "dict": Row(DictOutput, "conv2d*4", {POINTWISE: "add*4 mul*2 silu"}),
    "two inputs": Row(TwoInputs, "conv2d", {FIRST: "conv2d*2", POINTWISE: "add*2 mul sigmoid"}),
    "sequences": Row(
        Sequences,
        "conv2d*2 linear",
        {FIRST: "conv1d", POINTWISE: "add*3 prelu", LAST: "conv1d"},
        trace={POINTWISE: "add*2 prelu", PARAMETRIZED: "conv1d", "operators": "conv2d linear"},
    ),
}
CASES = [
    (name, capture)
    for name, row in ROWS.items()
    for capture in CAPTURES[: 1 + (row.trace is not None)]
]
cases = pytest.mark.parametrize(("name", "capture"), CASES)
ALIASES = {
    "truediv": "div",
    "iadd": "add",
    "interpolate": "upsample_bilinear2d",
}
"""Operators of a symbolic trace, and the names that an export gives them."""
EXAMPLE, OTHER = (2, 10, 8), (3, 13, 11)


def counted(text: str) -> Counter[str]:
    """Names with their numbers: "add*2 mul"."""
    pairs = (word.partition("*") for word in text.split())
    return Counter({name: int(number or 1) for name, _, number in pairs})


def inputs(name: str, size: tuple[int, int, int], seed: int) -> tuple[Tensor, ...]:
    batch, height, width = size
    generator = torch.Generator().manual_seed(seed)
    if name == "odd sizes":
        height, width = height + height % 2, width + width % 2
    shapes = [(batch, 3, height, width)]
    if name == "sequences":
        shapes = [(batch, 4, height * width)]
    if name == "two inputs":
        shapes.append((batch, 1, height, width))
    return tuple(torch.rand(shape, generator=generator) for shape in shapes)


@functools.cache
def prepared_network(name: str, capture: str) -> tuple[nn.Module, GraphModule]:
    """The network and its prepared form."""
    torch.manual_seed(0)
    model = ROWS[name].build()
    given = inputs(name, EXAMPLE, 1) if capture == "export" else None
    return model, qmir_ao.prepare_qat(model, qmir_ao.get_qmir_qconfig(4, 4), given)


@functools.cache
def pair(name: str, capture: str) -> tuple[GraphModule, LoweredModule]:
    """The prepared network after one step, with its gradients checked, and its lowered form."""
    prepared = prepared_network(name, capture)[1]
    optimizer = torch.optim.Adam(prepared.parameters(), lr=1e-4)
    prepared.train()
    results = tree_leaves(prepared(*inputs(name, EXAMPLE, 2)))
    sum(y.square().mean() for y in results).backward()
    for key, parameter in prepared.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
    optimizer.step()
    prepared.eval()
    return prepared, qmir_ao.convert_and_lower(prepared)


def switch(prepared: GraphModule, on: bool) -> None:
    for module in prepared.modules():
        if isinstance(module, QmirFakeQuantize):
            module.enable_fake_quant(on)


def run(model: nn.Module, given: tuple[Tensor, ...]) -> list[Tensor]:
    """Results; the network gets inputs of its own, as it may work in place on them."""
    with torch.no_grad():
        results: list[Tensor] = tree_leaves(model(*(x.clone() for x in given)))
    return results


@cases
def test_the_captured_network_is_the_network(name: str, capture: str) -> None:
    model, prepared = prepared_network(name, capture)
    pair(name, capture)
    own, captured = model.state_dict(), prepared.state_dict()
    model.load_state_dict({k: captured.get(k, v) for k, v in own.items()})
    switch(prepared.eval(), on=False)
    try:
        for size in (EXAMPLE, OTHER):
            given = inputs(name, size, 3)
            for got, want in zip(run(prepared, given), run(model.eval(), given), strict=True):
                torch.testing.assert_close(got, want, atol=CAPTURED_NETWORK, rtol=0)
    finally:
        switch(prepared, on=True)


@cases
def test_operators_agree_on_equal_inputs(name: str, capture: str) -> None:
    prepared, lowered = pair(name, capture)
    check_operators(prepared, lowered, *inputs(name, OTHER, 4))


@cases
def test_networks_agree_end_to_end(name: str, capture: str) -> None:
    prepared, lowered = pair(name, capture)
    results = []
    for size, seed in itertools.product((EXAMPLE, OTHER, (1, 9, 14)), (5, 6, 7)):
        given = inputs(name, size, seed)
        for got, want in zip(run(lowered, given), run(prepared, given), strict=True):
            peak = want.max() - want.min()
            assert got.shape == want.shape
            results.append((got / peak, want / peak))
    assert pooled_psnr(results) >= END_TO_END_PSNR[4]


@cases
def test_what_stays_in_float_is_what_the_row_says(name: str, capture: str) -> None:
    row, report = ROWS[name], pair(name, capture)[1].report
    kinds, floats = row.operators, dict(row.floats)
    if capture == "trace":
        assert row.trace is not None
        floats |= row.trace
        kinds = floats.pop("operators", kinds)
    assert Counter(r.kind for r in report.operators) == counted(kinds)
    if row.framed:
        floats |= {FIRST: floats.get(FIRST, "conv2d"), LAST: floats.get(LAST, "conv2d")}
    found: dict[str, Counter[str]] = {}
    for record in report.left_in_float:
        found.setdefault(record.reason, Counter())[ALIASES.get(record.op, record.op)] += 1
    assert found == {reason: counted(text) for reason, text in floats.items() if text}


@cases
def test_saved_and_loaded_gives_the_same_bytes(name: str, capture: str, tmp_path: Path) -> None:
    lowered = pair(name, capture)[1]
    qmir_ao.save(lowered, tmp_path / "model")
    loaded = qmir_ao.load(tmp_path / "model")
    given = inputs(name, OTHER, 6)
    for got, want in zip(run(loaded, given), run(lowered, given), strict=True):
        assert same_bytes(got, want)
    assert loaded.report == lowered.report


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.trace is None])
def test_what_cannot_be_traced_says_where(name: str) -> None:
    with pytest.raises(CaptureError, match=r"example_inputs.*plain_\w+\.py:\d+ in module"):
        qmir_ao.prepare_qat(ROWS[name].build(), qmir_ao.qmir_qconfig)


def test_decisions_on_sizes_hold_for_sizes_that_decide_alike(tmp_path: Path) -> None:
    model = PadsOdd()
    prepared = qmir_ao.prepare_qat(model, qmir_ao.qmir_qconfig, (torch.rand(2, 3, 9, 11),))
    switch(prepared.eval(), on=False)
    for size in ((3, 3, 13, 7), (2, 3, 11, 9)):
        x = torch.rand(size)
        assert torch.equal(run(prepared, (x,))[0], run(model, (x,))[0])
    switch(prepared.train(), on=True)
    prepared(torch.rand(2, 3, 9, 11))
    lowered = qmir_ao.convert_and_lower(prepared.eval())
    qmir_ao.save(lowered, tmp_path / "model")
    for network in (prepared, lowered, qmir_ao.load(tmp_path / "model")):
        with pytest.raises(ConfigError, match=r"\(x.shape\[2\] % 2\) != 0: its forward decides"):
            network(torch.rand(1, 3, 10, 9))
        with pytest.raises(ConfigError, match=r"\(x.shape\[3\] % 2\) == 1"):
            network(torch.rand(1, 3, 9, 10))


class Decides(nn.Module):
    """One decision of each sort, of which an example takes one side."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Conv2d(3, 3, 3, padding=1) for _ in range(3)))

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(x)
        batch, _, height, width = x.shape
        if height == width:
            y = 2 * y
        if batch == 3:
            y = y + 1
        if max(height, width) > 16 or height // 2 + width < 5:
            y = -y
        return y


@pytest.mark.parametrize(
    ("example", "alike", "other"),
    [
        ((2, 8, 9), [(4, 9, 8), (1, 7, 16)], [(2, 8, 8), (3, 8, 9), (2, 17, 8), (2, 2, 3)]),
        ((2, 8, 8), [(4, 9, 9)], [(2, 8, 9), (3, 8, 8), (2, 17, 17)]),
        ((3, 8, 9), [(3, 9, 8)], [(1, 8, 9), (2, 8, 9)]),
    ],
)
def test_no_size_takes_a_decision_of_another(
    example: tuple[int, ...], alike: list[tuple[int, ...]], other: list[tuple[int, ...]]
) -> None:
    model = Decides().eval()

    def image(size: tuple[int, ...]) -> Tensor:
        return torch.rand(size[0], 3, *size[1:])

    prepared = qmir_ao.prepare_qat(model, qmir_ao.get_qmir_qconfig(8, 8), (image(example),))
    prepared(image(example))
    lowered = qmir_ao.convert_and_lower(prepared.eval())
    for size in (example, *alike):
        x = image(size)
        (got,), (want,) = run(lowered, (x,)), run(model, (x,))
        assert psnr(got / (want.max() - want.min()), want / (want.max() - want.min())) > 20.0
    for size in other:
        with pytest.raises(ConfigError, match=r"captured (where|for)"):
            lowered(image(size))


@pytest.mark.parametrize("capture", CAPTURES)
def test_a_result_that_depends_on_earlier_calls_is_refused(capture: str) -> None:
    given = inputs("counts", EXAMPLE, 1) if capture == "export" else None
    with pytest.raises(CaptureError, match=r"'calls', which its result.*keeps no state"):
        qmir_ao.prepare_qat(Counts(), qmir_ao.qmir_qconfig, given)


@pytest.mark.parametrize("capture", CAPTURES)
def test_capture_leaves_the_buffers_of_the_network_alone(capture: str) -> None:
    model, given = MixesImages(), inputs("mixes images", EXAMPLE, 1)
    qconfig = qmir_ao.qmir_qconfig
    prepared = qmir_ao.prepare_qat(model, qconfig, given if capture == "export" else None)
    assert model.state_dict()["calls"] == 0
    assert prepared.state_dict().get("calls", torch.zeros(())) == 0


@pytest.mark.parametrize("capture", CAPTURES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_floating_point_types_are_refused(capture: str, dtype: torch.dtype) -> None:
    model, x = QuantizedTwice().to(dtype), torch.rand(1, 3, 8, 9, dtype=dtype)
    with pytest.raises(CaptureError, match=rf"'first.weight' is {dtype}.*model.float\(\)"):
        qmir_ao.prepare_qat(model, qmir_ao.qmir_qconfig, (x,) if capture == "export" else None)


@pytest.mark.parametrize("capture", CAPTURES)
def test_the_memory_layout_of_an_image_changes_no_code(capture: str) -> None:
    prepared, lowered = pair("grouped and transposed", capture)
    (x,) = inputs("grouped and transposed", OTHER, 7)
    strided = torch.empty(3, 11, 3, 26).permute(0, 2, 3, 1)[:, :, ::2].copy_(x)
    assert not strided.is_contiguous()
    check_operators(prepared, lowered, strided)
    check_operators(prepared, lowered, x.to(memory_format=torch.channels_last))


def test_weights_in_another_memory_layout_come_back_from_a_file(tmp_path: Path) -> None:
    model = GroupedTransposed().to(memory_format=torch.channels_last)
    prepared = qmir_ao.prepare_qat(model, qmir_ao.qmir_qconfig)
    prepared(torch.rand(2, 3, 10, 8))
    lowered = qmir_ao.convert_and_lower(prepared.eval())
    qmir_ao.save(lowered, tmp_path / "model")
    x = torch.rand(2, 3, 9, 11)
    assert same_bytes(qmir_ao.load(tmp_path / "model")(x), lowered(x))


@pytest.mark.parametrize("capture", CAPTURES)
def test_batches_that_mix_images_run_whole(capture: str) -> None:
    prepared, lowered = pair("mixes images", capture)
    given = inputs("mixes images", OTHER, 8)
    alone = torch.cat([lowered(given[0][i : i + 1]) for i in range(3)])
    (whole,) = run(lowered, given)
    assert psnr(alone, whole) < 40.0
    assert psnr(whole, run(prepared, given)[0]) >= END_TO_END_PSNR[4]
