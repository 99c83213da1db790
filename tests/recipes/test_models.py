"""The zoo: published keys and counts, parity of one block, both captures."""

import importlib
import pkgutil
import re
from typing import Any

import numpy as np
import pytest
import torch
from support.paths import DATA, GOLDEN, needs_data, needs_golden
from support.tolerances import OFFICIAL_GRAD, OFFICIAL_VALUE

from qmir_ao.errors import CheckpointError, ConfigError
from qmir_ao.recipes import models
from qmir_ao.recipes.evaluate import evaluate
from qmir_ao.recipes.models import create_model, list_models, registry
from qmir_ao.recipes.models.mambair import MambaIR, VSSBlock

PUBLISHED = {
    "mambair-light-x2": 905_016,
    "mambair-light-x3": 913_131,
    "mambair-light-x4": 924_492,
    "mambair-x2": 20_421_863,
    "mambair-x3": 20_606_503,
    "mambair-x4": 20_569_575,
    "mambair-denoise": 15_777_507,
    "mambair-jpeg": 15_771_025,
}
TINY_LIMIT = 150_000

SCAN_KEYS = [
    "x_proj_weight",
    "dt_projs_weight",
    "dt_projs_bias",
    "A_logs",
    "Ds",
    "in_proj.weight",
    "conv2d.weight",
    "conv2d.bias",
    "out_norm.weight",
    "out_norm.bias",
    "out_proj.weight",
]
BLOCK_KEYS = {
    "skip_scale",
    "skip_scale2",
    *(f"{norm}.{leaf}" for norm in ("ln_1", "ln_2") for leaf in ("weight", "bias")),
    *(f"self_attention.{leaf}" for leaf in SCAN_KEYS),
}


def conv_keys(*names: str) -> set[str]:
    return {f"conv_blk.cab.{name}.{leaf}" for name in names for leaf in ("weight", "bias")}


LIGHT_KEYS = BLOCK_KEYS | conv_keys("0", "1", "3", "4", "5.attention.1", "5.attention.3")
CLASSIC_KEYS = BLOCK_KEYS | conv_keys("0", "2", "3.attention.1", "3.attention.3")
TOP_KEYS = {
    "mambair-light-x2": {"upsample.0"},
    "mambair-x3": {"conv_before_upsample.0", "upsample.0", "conv_last"},
    "mambair-x4": {"conv_before_upsample.0", "upsample.0", "upsample.2", "conv_last"},
    "mambair-denoise": {"conv_last"},
}
SHARED_KEYS = {"conv_first", "patch_embed.norm", "norm", "conv_after_body"}


def small(**changes: Any) -> MambaIR:
    settings: dict[str, Any] = {
        "scale": 2,
        "upsampler": "pixelshuffledirect",
        "embed_dim": 30,
        "depths": (1, 1),
        "d_state": 2,
        "expand": 1.0,
        "drop_path_rate": 0.0,
    }
    return MambaIR(**{**settings, **changes})


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_count_is_the_published_one(name: str) -> None:
    with torch.device("meta"):
        model = create_model(name)
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[name]


def test_tiny_model_is_below_its_limit() -> None:
    assert sum(p.numel() for p in create_model("mambair-tiny-x2").parameters()) < TINY_LIMIT


def test_list_models_is_complete() -> None:
    modules = [
        importlib.import_module(f"{models.__name__}.{found.name}")
        for found in pkgutil.iter_modules(models.__path__)
    ]
    names = [name for module in modules for name in getattr(module, "CONFIGS", ())]
    assert {*PUBLISHED, "mambair-tiny-x2"} <= set(names)
    assert len(names) == len(set(names))
    assert sorted(list_models()) == sorted(names)


@pytest.mark.parametrize("name", TOP_KEYS)
def test_state_dict_keys_are_the_published_ones(name: str) -> None:
    with torch.device("meta"):
        model = create_model(name)
    groups = len(model.layers)
    block = LIGHT_KEYS if "light" in name else CLASSIC_KEYS
    expected = {
        f"layers.{g}.residual_group.blocks.{b}.{key}"
        for g in range(groups)
        for b in range(6)
        for key in block
    }
    tops = SHARED_KEYS | TOP_KEYS[name] | {f"layers.{g}.conv" for g in range(groups)}
    expected |= {f"{top}.{leaf}" for top in tops for leaf in ("weight", "bias")}
    assert set(model.state_dict()) == expected


def test_scan_parameters_have_published_shapes_and_start() -> None:
    scan = create_model("mambair-light-x2").layers[0].residual_group.blocks[0].self_attention
    assert scan.x_proj_weight.shape == (4, 24, 72)
    assert scan.dt_projs_weight.shape == (4, 72, 4)
    assert scan.dt_projs_bias.shape == (4, 72)
    torch.testing.assert_close(-torch.exp(scan.A_logs), -torch.arange(1.0, 11.0).expand(4 * 72, 10))
    delta = torch.nn.functional.softplus(scan.dt_projs_bias)
    assert delta.min() > 9e-4 and delta.max() < 0.11
    assert torch.equal(scan.Ds, torch.ones(4 * 72))


@pytest.mark.parametrize("name", ["mambair-tiny-x2", "mambair-light-x3"])
def test_output_has_the_scale(name: str) -> None:
    model = create_model(name).eval()
    with torch.no_grad():
        assert model(torch.rand(1, 3, 7, 9)).shape == (1, 3, 7 * model.scale, 9 * model.scale)


@pytest.mark.parametrize(
    ("changes", "channels"),
    [
        ({"upsampler": "pixelshuffle", "scale": 4}, 3),
        ({"upsampler": "", "scale": 1}, 3),
        ({"upsampler": "", "scale": 1, "in_channels": 1}, 1),
    ],
    ids=["classic-x4", "denoise", "grey"],
)
def test_heads_have_the_right_output(changes: dict[str, Any], channels: int) -> None:
    model = small(**changes)
    y = model(torch.rand(2, channels, 5, 8))
    assert y.shape == (2, channels, 5 * model.scale, 8 * model.scale)


def test_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'mambair-light-x2'"):
        create_model("mambair-ligth-x2")


def test_no_weights_for_a_published_name() -> None:
    with pytest.raises(ConfigError, match="no weights come with 'mambair-x2'"):
        create_model("mambair-x2", pretrained=True)


@pytest.mark.parametrize(
    "changes",
    [
        {"upsampler": "nearest"},
        {"scale": 5},
        {"scale": 2, "upsampler": ""},
        {"embed_dim": 29},
        {"depths": (2, 0)},
        {"in_channels": 4},
        {"drop_path_rate": 1.0},
    ],
    ids=str,
)
def test_bad_settings_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="MambaIR"):
        small(**changes)


def test_pretrained_tiny_enlarges_better_than_noise() -> None:
    model = create_model("mambair-tiny-x2", pretrained=True).eval()
    ramp = torch.linspace(0.2, 0.8, 24).expand(1, 3, 24, 24)
    with torch.no_grad():
        y = model(ramp)
    target = torch.nn.functional.interpolate(ramp, scale_factor=2, mode="bilinear")
    assert (y - target).abs()[..., 4:-4, 4:-4].max() < 0.02


@needs_data
@pytest.mark.slow
def test_pretrained_tiny_has_the_scores_of_its_card() -> None:
    model = create_model("mambair-tiny-x2", pretrained=True).eval()
    with torch.inference_mode():
        scores = evaluate(model, DATA / "sets/Set5/HR", scale=2)
    gain = scores.mean("psnr") - scores.mean("baseline_psnr")
    assert gain >= 2.5
    card = (registry.ASSETS / "mambair-tiny-x2.md").read_text()
    printed = re.search(r"Set5, mean\*\* \| (\d+\.\d+) / \d\.\d+ \| (\d+\.\d+) /", card)
    assert printed is not None
    for column, value in zip(("psnr", "baseline_psnr"), printed.groups(), strict=True):
        assert scores.mean(column) == pytest.approx(float(value), abs=0.006)


def test_changed_weights_are_refused(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "mambair-tiny-x2"
    data = bytearray((registry.ASSETS / f"{name}.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / f"{name}.safetensors").write_bytes(data)
    monkeypatch.setattr(registry, "ASSETS", tmp_path)
    with pytest.raises(CheckpointError, match="SHA-256"):
        create_model(name, pretrained=True)
    (tmp_path / f"{name}.safetensors").unlink()
    with pytest.raises(CheckpointError, match="missing"):
        create_model(name, pretrained=True)


@needs_golden
def test_block_equals_the_published_one() -> None:
    with np.load(GOLDEN / "mambair_block_official.npz") as golden:
        data = {
            key: torch.from_numpy(golden[key])
            for key in golden
            if key.startswith("fp|") and not key.startswith("fp|cfg")
        }
    block = VSSBlock(32, d_state=4, expand=1.5, light=True)
    block.load_state_dict(
        {key.removeprefix("fp|sd|"): v for key, v in data.items() if key.startswith("fp|sd|")}
    )
    x = data["fp|x"].reshape(2, 9, 7, 32).requires_grad_()
    y = block(x)
    torch.testing.assert_close(
        y.reshape(2, 63, 32), data["fp|y"], atol=OFFICIAL_VALUE, rtol=OFFICIAL_VALUE
    )
    y.backward(data["fp|gy"].reshape(2, 9, 7, 32))
    grads = {name: p.grad for name, p in block.named_parameters()}
    pairs = [(x.grad.reshape(2, 63, 32), data["fp|gx"])]
    pairs += [(grads[name], data[f"fp|grads|{name}"]) for name in grads]
    for ours, theirs in pairs:
        # Not a quotient: the squeezed channel of the attention may be dead, its gradient is 0.
        assert (ours - theirs).norm() <= OFFICIAL_GRAD * theirs.norm()


def test_drop_path_drops_whole_samples_in_training_only() -> None:
    torch.manual_seed(1)
    model = small(drop_path_rate=0.5)
    branch = model.layers[1].residual_group.blocks[0].drop_path
    x = torch.ones(64, 2, 2, 30)
    kept = branch(x)
    assert set(kept.unique().tolist()) == {0.0, 2.0}
    assert torch.equal(kept.amin((1, 2, 3)), kept.amax((1, 2, 3)))
    assert torch.equal(branch.eval()(x), x)


@pytest.mark.parametrize("rate", [0.0, 0.2])
def test_export_is_exact_at_another_size(rate: float) -> None:
    model = small(drop_path_rate=rate).eval()
    dynamic = torch.export.Dim.DYNAMIC
    program = torch.export.export(
        model,
        (torch.rand(2, 3, 8, 10),),
        dynamic_shapes=({0: dynamic, 2: dynamic, 3: dynamic},),
    )
    scans = [n for n in program.graph.nodes if n.target == torch.ops.qmir.ss2d_scan.default]
    assert len(scans) == 2
    for size in [(1, 3, 7, 11), (3, 3, 16, 5)]:
        x = torch.rand(size)
        with torch.no_grad():
            assert torch.equal(program.module()(x), model(x))


def test_symbolic_trace_is_exact_at_any_size() -> None:
    model = small(drop_path_rate=0.2).eval()
    traced = torch.fx.symbolic_trace(model)
    for size in [(2, 3, 8, 10), (1, 3, 7, 11)]:
        x = torch.rand(size)
        with torch.no_grad():
            assert torch.equal(traced(x), model(x))
    targets = [n.target for n in traced.graph.nodes if n.op == "call_function"]
    assert targets.count(torch.ops.qmir.ss2d_scan) == 2


def test_result_of_an_image_does_not_depend_on_its_batch() -> None:
    model = small().eval()
    x = torch.rand(3, 3, 9, 12)
    with torch.no_grad():
        torch.testing.assert_close(model(x)[1:2], model(x[1:2]), atol=1e-6, rtol=0)
