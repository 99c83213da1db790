"""From prepared to integers: operator by operator, end to end, and what is in memory."""

import copy
from pathlib import Path

import pytest
import torch
from support.chains import without_chains
from support.integers import same_bytes, with_threads
from support.lowering import check_operators, pooled_psnr, psnr
from support.models import CAPTURES, ConvNet, example, tiny_pair, train_step
from support.tolerances import END_TO_END_PSNR
from torch import Tensor, nn
from torch.ao.quantization import QConfigMapping

import qmir_ao
from qmir_ao.backend.cpu import registration
from qmir_ao.backend.lowered import LoweredModule
from qmir_ao.errors import ConfigError, UnsupportedGraph
from qmir_ao.recipes.models import create_model

PAIRS = [("export", 8), ("export", 4), ("trace", 4), ("export", 2), ("trace", 2)]
pairs = pytest.mark.parametrize(("capture", "bits"), PAIRS)
FLOAT_OPERATORS = {
    "add",
    "mul",
    "sub",
    "layer_norm",
    "silu",
    "gelu",
    "relu",
    "sigmoid",
    "conv2d",
    "adaptive_avg_pool2d",
}


DRAWS = 8


def end_to_end(
    prepared: nn.Module, lowered: LoweredModule, size: tuple[int, ...], draws: int = DRAWS
) -> float:
    """PSNR in dB between what both make of several random batches, over all their pixels."""
    batches = [torch.rand(size) for _ in range(draws)]
    with torch.no_grad():
        return pooled_psnr([(lowered(x), prepared(x)) for x in batches])


sizes = pytest.mark.parametrize("size", [(1, 3, 19, 23), (3, 3, 11, 14)], ids=str)


@pairs
@sizes
def test_operators_agree_on_equal_inputs(capture: str, bits: int, size: tuple[int, ...]) -> None:
    prepared, lowered = tiny_pair(capture, bits)
    check_operators(prepared, lowered, torch.rand(size))


@sizes
@pytest.mark.parametrize(
    ("capture", "widths"), [("export", (4, 8)), ("trace", (8, 2)), ("trace", (2, 4))]
)
def test_weights_and_activations_of_other_bits_agree(
    capture: str, widths: tuple[int, int], size: tuple[int, ...]
) -> None:
    prepared, lowered = tiny_pair(capture, widths)
    found = {(r.weight_bits, r.act_bits) for r in lowered.report.operators}
    assert found == {widths, (None, widths[1])}
    check_operators(prepared, lowered, torch.rand(size))
    assert end_to_end(prepared, lowered, size) >= END_TO_END_PSNR[min(widths)]


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 2])
def test_the_light_network_agrees(bits: int) -> None:
    prepared, lowered = tiny_pair("trace", bits, "mambair-light-x2")
    x = torch.rand(1, 3, 9, 7)
    check_operators(prepared, lowered, x)
    with torch.no_grad():
        assert psnr(lowered(x), prepared(x)) >= END_TO_END_PSNR[bits]


@pairs
@sizes
def test_images_agree_end_to_end(capture: str, bits: int, size: tuple[int, ...]) -> None:
    prepared, lowered = tiny_pair(capture, bits)
    got = lowered(torch.rand(size))
    assert got.shape == (size[0], 3, 2 * size[2], 2 * size[3])
    assert not got.requires_grad
    assert end_to_end(prepared, lowered, size) >= END_TO_END_PSNR[bits]


@pairs
def test_batch_mates_change_no_byte(capture: str, bits: int) -> None:
    lowered = tiny_pair(capture, bits)[1]
    x = torch.rand(3, 3, 19, 23)
    whole = lowered(x)
    for i in range(3):
        assert same_bytes(whole[i : i + 1], lowered(x[i : i + 1])), i


@pairs
def test_runs_and_threads_change_no_byte(capture: str, bits: int) -> None:
    lowered = tiny_pair(capture, bits)[1]
    # Larger than the 32,768 elements below which torch uses one thread.
    x = torch.rand(1, 3, 39, 45)
    first = lowered(x)
    assert same_bytes(first, lowered(x))
    for count in (1, 2, 3):
        assert same_bytes(first, with_threads(count, lambda: lowered(x))), count


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_reference_operators_give_the_bytes_of_the_kernels(
    bits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no norm or activation is fused, which rounds by a few units otherwise than torch's."""
    prepared, lowered = tiny_pair("export", bits)
    if bits < 8:
        lowered = without_chains(prepared)
    qmir_ao.save(lowered, tmp_path / "net")
    loaded, x = qmir_ao.load(tmp_path / "net"), torch.rand(2, 3, 9, 11)
    want = lowered(x)
    asked: list[None] = []
    monkeypatch.setattr(registration, "library", lambda: asked.append(None))
    for network in (lowered, loaded):
        assert same_bytes(network(x), want)
    # Every quantized operand and every operator of two images, twice.
    assert len(asked) > 4 * len(lowered.report.operators)


@pytest.mark.parametrize("bits", [4, 2])
def test_reference_operators_give_the_images_of_the_kernels(
    bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    lowered = tiny_pair("export", bits)[1]
    batches = [torch.rand(1, 3, 9, 11) for _ in range(DRAWS)]
    want = [lowered(x) for x in batches]
    monkeypatch.setattr(registration, "library", lambda: None)
    got = [lowered(x) for x in batches]
    assert pooled_psnr(zip(got, want, strict=True)) >= END_TO_END_PSNR[bits]


@pytest.mark.parametrize("capture", CAPTURES)
def test_lowering_leaves_the_prepared_model_as_it_was(capture: str) -> None:
    prepared = tiny_pair(capture, 4)[0]
    x = torch.rand(1, 3, 9, 10)
    before, code = copy.deepcopy(prepared.state_dict()), prepared.code
    with torch.no_grad():
        y = prepared(x)
    prepared.train()
    lowered = qmir_ao.convert_and_lower(prepared)
    assert prepared.training
    prepared.eval()
    after = prepared.state_dict()
    assert prepared.code == code
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    with torch.no_grad():
        assert same_bytes(prepared(x), y)
    assert same_bytes(lowered(x), tiny_pair(capture, 4)[1](x))
    own = {t.data_ptr() for t in prepared.state_dict().values() if t.numel()}
    assert own
    assert not own & {t.data_ptr() for t in lowered.state_dict().values() if t.numel()}


@pairs
def test_report_lists_what_stays_in_float(capture: str, bits: int) -> None:
    report = tiny_pair(capture, bits)[1].report
    kinds = [r.kind for r in report.operators]
    counts = {kind: kinds.count(kind) for kind in set(kinds)}
    assert counts == {"linear": 8, "conv2d": 30, "selective_scan": 4}
    assert {r.act_bits for r in report.operators} == {bits}
    assert {r.weight_bits for r in report.operators} == {bits, None}
    assert {r.op for r in report.left_in_float} == FLOAT_OPERATORS
    convolutions = [r for r in report.left_in_float if r.op == "conv2d"]
    roots = [r.module.split(".")[0] for r in convolutions]
    assert {r for r in roots if "layers" not in r} == {"conv_first", "conv_after_body", "upsample"}
    attention = [r for r in convolutions if "channel attention" in r.reason]
    assert len(attention) == len(convolutions) - 3
    assert all(r.reason and r.module for r in convolutions)
    assert "operators on integer codes" in str(report)


@pairs
def test_packed_weights_have_the_bytes_of_their_bits(capture: str, bits: int) -> None:
    lowered = tiny_pair(capture, bits)[1]
    weights = [r for r in lowered.report.operators if r.kind != "selective_scan"]
    assert len(weights) == 38
    for record in weights:
        assert record.weight_bytes == -(-record.float_bytes * bits // 32), record.name
    total = sum(r.float_bytes for r in weights)
    assert lowered.report.float_bytes == total
    assert lowered.report.weight_bytes <= total * bits / 32 + len(weights)
    stored = sum(t.numel() for t in lowered.state_dict().values() if t.dtype == torch.uint8)
    assert stored == lowered.report.weight_bytes


@pairs
def test_no_float_copy_of_a_quantized_weight_remains(capture: str, bits: int) -> None:
    prepared, lowered = tiny_pair(capture, bits)
    quantized = {r.module for r in lowered.report.operators if r.kind == "conv2d"}
    assert quantized
    sizes = {r.float_bytes // 4 for r in lowered.report.operators if r.float_bytes > 400 * 4}
    tensors = dict(lowered.named_buffers()) | dict(lowered.named_parameters())
    tensors |= lowered.state_dict()
    reported = {r.module for r in lowered.report.left_in_float}
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.numel() in sizes:
            assert any(path.replace(".", "_") in name for path in reported if path), name
    loose = [
        v
        for module in lowered.modules()
        for v in vars(module).values()
        if isinstance(v, Tensor) and v.is_floating_point()
    ]
    assert not loose
    float_bytes = sum(t.numel() * 4 for t in lowered.buffers() if t.is_floating_point())
    assert float_bytes < sum(p.numel() * 4 for p in prepared.parameters())


def test_module_settings_give_mixed_bits_and_float_layers() -> None:
    mapping = QConfigMapping().set_global(qmir_ao.get_qmir_qconfig(4, 4))
    mapping.set_module_name("body", qmir_ao.get_qmir_qconfig(2, 8))
    mapping.set_module_name("point", None)
    mapping.set_module_name("last", qmir_ao.get_qmir_qconfig(8, 8))
    for capture in CAPTURES:
        torch.manual_seed(0)
        prepared = qmir_ao.prepare_qat(ConvNet(), mapping, example(capture, 1, 3, 9, 10))
        train_step(prepared, torch.rand(2, 3, 9, 10))
        prepared.eval()
        lowered = qmir_ao.convert_and_lower(prepared)
        found = {r.module: (r.weight_bits, r.act_bits) for r in lowered.report.operators}
        assert found == {"body": (2, 8), "depthwise": (4, 4), "last": (8, 8)}, capture
        floats = {r.module: r.reason for r in lowered.report.left_in_float if r.op != "add"}
        assert {"first", "point"} <= floats.keys()
        check_operators(prepared, lowered, torch.rand(2, 3, 9, 10))


@pytest.mark.parametrize("kind", [nn.Linear, nn.Conv2d])
def test_a_module_type_can_stay_in_float(kind: type[nn.Module]) -> None:
    mapping = QConfigMapping().set_global(qmir_ao.qmir_qconfig).set_object_type(kind, None)
    for capture in CAPTURES:
        prepared = qmir_ao.prepare_qat(ConvNet(), mapping, example(capture, 1, 3, 9, 10))
        report = qmir_ao.convert_and_lower(prepared).report
        name = "linear" if kind is nn.Linear else "conv2d"
        assert {r.kind for r in report.operators} == {"linear", "conv2d"} - {name}, capture


@pytest.mark.parametrize("capture", CAPTURES)
def test_official_placement_trains_and_lowers(capture: str) -> None:
    qconfig = qmir_ao.get_qmir_qconfig(4, 4, preset="official")
    prepared = qmir_ao.prepare_qat(
        create_model("mambair-tiny-x2"),
        qconfig,
        example(capture, 1, 3, 8, 8),
        placement="official",
    )
    train_step(prepared, torch.rand(2, 3, 8, 8))
    prepared.eval()
    lowered = qmir_ao.convert_and_lower(prepared)
    size = (2, 3, 9, 11)
    assert end_to_end(prepared, lowered, size) >= END_TO_END_PSNR[4]
    assert lowered.report.operators
    check_operators(prepared, lowered, torch.rand(size))


def test_bad_targets_and_models_are_named(tmp_path: object) -> None:
    prepared = tiny_pair("trace", 4)[0]
    with pytest.raises(ConfigError, match=r"target='tpu'.*cpu"):
        qmir_ao.convert_and_lower(prepared, target="tpu")
    with pytest.raises(ConfigError, match="writes no file"):
        qmir_ao.convert_and_lower(prepared, path=str(tmp_path))
    with pytest.raises(ConfigError, match="prepare_qat"):
        qmir_ao.convert_and_lower(ConvNet())
    with pytest.raises(UnsupportedGraph, match="prepare_qat"):
        qmir_ao.convert_and_lower(torch.fx.symbolic_trace(ConvNet()))
    other = qmir_ao.prepare_qat(ConvNet(), qmir_ao.qmir_qconfig)
    with pytest.raises(UnsupportedGraph, match="counterpart"):
        qmir_ao.compare(other, tiny_pair("trace", 4)[1], torch.rand(1, 3, 9, 10))
