"""The command line: exit codes, output on the right stream, bad input, interruption."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from support.torchvision_double import install

import qmir_ao
from qmir_ao.recipes import cli, start
from qmir_ao.recipes.checkpoint import read_weights, save_weights
from qmir_ao.recipes.metrics import _perceptual
from qmir_ao.recipes.models import create_model
from qmir_ao.recipes.models.registry import MODELS

TINY = "mambair-tiny-x2"
MINUTE = {"timeout": 120}


def write_png(path: Path, shape: tuple[int, ...] = (24, 20, 3), dtype: type = np.uint8) -> Path:
    """Write a random image."""
    top = np.iinfo(dtype).max
    pixels = np.random.default_rng(0).integers(0, top, shape, dtype=dtype)
    assert cv2.imwrite(str(path), pixels)
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny network with random weights."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_weights(create_model(TINY), path, {"model": TINY})
    return path


@pytest.fixture(scope="module")
def lowered(tmp_path_factory: pytest.TempPathFactory, weights: Path) -> Path:
    """Tiny network after three steps of training at 4 bits, through the command itself."""
    folder = tmp_path_factory.mktemp("lowered")
    images = folder / "images"
    images.mkdir()
    write_png(images / "a.png", (40, 40, 3))
    out = folder / "w4a4"
    settings = ["--iterations", "3", "--batch", "1", "--patch", "16"]
    assert cli.main(["quantize", str(weights), str(images), "-o", str(out), *settings]) == 0
    return out


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return write_png(tmp_path / "in.png")


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    for command in ("demo", "train", "quantize", "eval", "restore", "recipes", "run", "info"):
        assert command in text


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert qmir_ao.__version__ in capsys.readouterr().out


def test_the_entry_point_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["qmir", "--version"])
    assert start.main() == 0
    monkeypatch.delitem(sys.modules, "qmir_ao.recipes.cli")
    monkeypatch.setitem(sys.modules, "typer", None)
    assert start.main() == 2
    assert "qmir needs typer, which is missing; pip install" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "qmir_ao.recipes.cli", None)
    with pytest.raises(ModuleNotFoundError):
        start.main()


@pytest.mark.parametrize("line", ["", "nonsense", "eval", "info --nonsense x", "demo --seed x"])
def test_usage_errors(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(line.split()) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_help_needs_no_torch() -> None:
    code = "import sys, qmir_ao.recipes.cli; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, **MINUTE
    )
    assert done.stdout.strip() == "False"


def test_info_of_the_zoo(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", "mambair-light-x2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"] == 905_016


def test_info_of_weights(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", str(weights), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["model"] == TINY
    assert facts["scale"] == 2


def test_info_of_a_lowered_model(lowered: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", str(lowered), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["float_bytes"] == 8 * facts["weight_bytes"] > 0
    assert facts["bytes"] < facts["float_bytes"]
    assert {record["weight_bits"] for record in facts["operators"]} <= {4, None}
    assert all(record["reason"] for record in facts["left_in_float"])
    assert cli.main(["info", str(lowered)]) == 0
    assert "integer operators" in capsys.readouterr().out


def test_info_explains_a_lowered_model(lowered: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", str(lowered), "--explain"]) == 0
    assert "  LowerScan: 4 places (" in capsys.readouterr().out
    assert cli.main(["info", str(lowered), "--explain", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [record["name"] for record in facts["passes"]][-1] == "DedupeConstants"
    assert len(facts["operators"]) > 42
    assert cli.main(["info", TINY, "--explain"]) == 2
    assert "is for a lowered model" in capsys.readouterr().err


@pytest.mark.parametrize("source", ["weights", "lowered"])
def test_eval(
    source: str,
    image: Path,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = request.getfixturevalue(source)
    capsys.readouterr()
    assert cli.main(["eval", str(model), str(image.parent), "--scale", "2", "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["source"] == source
    assert [entry["name"] for entry in scores["images"]] == ["in.png"]
    assert scores["mean"]["psnr"] == scores["images"][0]["psnr"]
    assert cli.main(["eval", str(model), str(image.parent), "--scale", "3"]) == 2
    assert "enlarges 2 times" in capsys.readouterr().err


def test_eval_measures_lpips(
    weights: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_png(tmp_path / "in.png", (48, 40, 3))
    line = ["eval", str(weights), str(tmp_path), "--lpips"]
    assert cli.main([*line, "resnet"]) == 2
    assert "network must be one of ('alex', 'vgg', 'squeeze')" in capsys.readouterr().err
    install(monkeypatch)
    _perceptual.cache_clear()
    assert cli.main([*line, "alex", "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["mean"]["lpips"] == scores["images"][0]["lpips"] > 0.0
    assert scores["mean"]["baseline_lpips"] != scores["mean"]["lpips"]
    assert cli.main([*line, "alex"]) == 0
    assert "LPIPS" in capsys.readouterr().out
    _perceptual.cache_clear()
    assert cli.main([*line[:-1], "--json"]) == 0
    assert "lpips" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--task jpeg --quality 10", "enlarges 2 times, not 1"),
        ("--task denoise --sigma 0", "sigma must be above 0"),
        ("--task denoise --quality 10", "no setting 'quality'"),
        ("--task jepg", "did you mean 'jpeg'"),
        ("--sigma 25", "no setting 'sigma'"),
    ],
)
def test_eval_refuses_what_does_not_fit(
    options: str, message: str, weights: Path, image: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["eval", str(weights), str(image.parent), *options.split()]) == 2
    assert message in capsys.readouterr().err


def test_eval_of_another_task(
    image: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(MODELS, "mambair-denoise", {"embed_dim": 30, "depths": (1,), "d_state": 4})
    path = tmp_path / "denoise.safetensors"
    save_weights(create_model("mambair-denoise"), path, {"model": "mambair-denoise"})
    line = ["eval", str(path), str(image.parent)]
    assert cli.main(line) == 2
    assert "task must be said" in capsys.readouterr().err
    assert cli.main([*line, "--task", "jpeg"]) == 2
    assert "takes images of 3 channels" in capsys.readouterr().err
    assert cli.main([*line, "--task", "denoise", "--sigma", "25", "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert (scores["task"], scores["sigma"], scores["channel"]) == ("denoise", 25.0, "rgb")
    # One small image: the noise's own deviation scatters.
    assert scores["mean"]["baseline_psnr"] == pytest.approx(20.17, abs=0.4)


@pytest.mark.parametrize("source", ["weights", "lowered"])
def test_restore(source: str, image: Path, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(source)
    out = image.with_name("out.png")
    assert cli.main(["restore", str(image), str(out), "--model", str(model)]) == 0
    restored = cv2.imread(str(out), cv2.IMREAD_UNCHANGED)
    assert restored is not None
    assert restored.shape == (48, 40, 3)


def test_restore_tells_what_failed_and_does_the_rest(
    weights: Path, image: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (image.parent / "bad.png").write_bytes(image.read_bytes()[:200])
    (image.parent / "empty.png").touch()
    write_png(image.parent / "deep.png", dtype=np.uint16)
    write_png(image.parent / "grey.png", (20, 20))
    write_png(image.parent / "rgba.png", (20, 20, 4))
    out = image.parent / "out"
    assert cli.main(["restore", str(image.parent), str(out), "-m", str(weights), "--json"]) == 2
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert sorted(Path(p).name for p in result["written"]) == [
        "deep.png",
        "grey.png",
        "in.png",
        "rgba.png",
    ]
    assert sorted(Path(p).name for p in result["failed"]) == ["bad.png", "empty.png"]
    assert "bad.png" in captured.err
    assert sorted(p.name for p in out.iterdir()) == ["deep.png", "grey.png", "in.png", "rgba.png"]


@pytest.mark.parametrize("content", ["truncated", "empty", "text", "huge"])
def test_bad_images(
    content: str,
    weights: Path,
    image: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = {"truncated": image.read_bytes()[:-300], "empty": b"", "text": b"hello"}
    if content == "huge":
        monkeypatch.setenv("QMIR_MAX_PIXELS", "100")
    else:
        image.write_bytes(data[content])
    out = image.with_name("out.png")
    assert cli.main(["restore", str(image), str(out), "-m", str(weights)]) == 2
    error = capsys.readouterr().err
    assert "in.png" in error
    assert "Traceback" not in error
    assert not out.exists()


def test_unknown_model_gets_a_hint(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["restore", str(image), "out.png", "-m", "mambair-tinyx2"]) == 2
    assert f"did you mean '{TINY}'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "line",
    [
        "restore missing.png out.png",
        "eval missing.safetensors .",
        "eval missing.pth . --arch mambair-tiny-x2",
        f"train {TINY} missing -o out.safetensors",
        "train unknown-model . -o out.safetensors",
    ],
)
def test_missing_files(
    line: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(line.split()) == 2
    assert "error: " in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_weights_of_another_architecture(
    weights: Path, image: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["eval", str(weights), str(image.parent), "--arch", "mambair-light-x2"]
    assert cli.main(line) == 2
    error = capsys.readouterr().err
    assert "missing keys" in error
    assert "unexpected keys" in error or "shapes differ" in error


def test_weights_without_architecture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "tiny.pth"
    torch.save(create_model(TINY).state_dict(), path)
    assert cli.main(["info", str(path)]) == 2
    assert "--arch" in capsys.readouterr().err
    assert cli.main(["info", str(path), "--arch", TINY]) == 0


class _Hostile:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        import os

        return os.mkdir, ("executed",)


def test_hostile_pickle_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"params": _Hostile()}, "bad.pth")
    assert cli.main(["info", "bad.pth", "--arch", TINY]) == 2
    assert "bad.pth" in capsys.readouterr().err
    assert not Path("executed").exists()


@pytest.mark.parametrize("damage", ["flip", "truncate", "no manifest", "no weights"])
def test_damaged_lowered_model(
    damage: str,
    lowered: Path,
    image: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    copy = image.parent / "copy"
    shutil.copytree(lowered, copy)
    file = copy / "model.safetensors"
    data = bytearray(file.read_bytes())
    if damage == "flip":
        data[-5] ^= 0x10
        file.write_bytes(data)
    elif damage == "truncate":
        file.write_bytes(data[:-100])
    else:
        (copy / ("manifest.json" if damage == "no manifest" else "model.safetensors")).unlink()
    out = image.with_name("out.png")
    capsys.readouterr()
    assert cli.main(["restore", str(image), str(out), "-m", str(copy)]) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert not out.exists()


def test_quantize_keeps_what_it_trained(lowered: Path) -> None:
    names = {path.name for path in lowered.iterdir()}
    assert names >= {"model.safetensors", "manifest.json", "qat.safetensors"}
    assert not [path for path in lowered.parent.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("bits", ["0", "1", "9"])
def test_quantize_refuses_unknown_bits(
    bits: str, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    write_png(images / "a.png", (40, 40, 3))
    out = tmp_path / "out"
    line = ["quantize", str(weights), str(images), "-o", str(out), "--patch", "16"]
    assert cli.main([*line, "--bits", bits]) == 2
    assert "bits" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


def test_quantize_takes_a_rival(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    write_png(images / "a.png", (40, 40, 3))
    out = tmp_path / "out"
    line = ["quantize", str(weights), str(images), "-o", str(out), "--iterations", "1"]
    line += ["--batch", "1", "--patch", "16", "--activation", "lsq", "--weight"]
    assert cli.main([*line, "rfaa"]) == 2
    assert "allowed: 'rfa'" in capsys.readouterr().err
    assert cli.main([*line, "quantsr", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["activation"], facts["weight"]) == ("lsq", "quantsr")
    trained = read_weights(out / "qat.safetensors")
    # LSQ's activations have one step and no scalars of DLS; QuantSR's weights have no thresholds.
    assert any(key.endswith("activation_post_process_0.step") for key in trained)
    assert not any("scale_weights" in key or "thresholds" in key for key in trained)


def test_quantize_overwrites_nothing(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["quantize", str(weights), str(tmp_path), "-o", str(tmp_path)]) == 2
    assert "exists" in capsys.readouterr().err


def test_train_writes_weights_that_load(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = tmp_path / "images"
    images.mkdir()
    write_png(images / "a.png", (40, 40, 3))
    out = tmp_path / "tiny.safetensors"
    line = ["train", TINY, str(images), "-o", str(out), "--iterations", "2", "--batch", "1"]
    assert cli.main([*line, "--patch", "16", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["iterations"] == 2
    assert cli.main(["info", str(out)]) == 0


def test_ctrl_c_stops_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from qmir_ao.recipes import training_module

    images = tmp_path / "images"
    images.mkdir()
    write_png(images / "a.png", (40, 40, 3))
    step = training_module.RestorationModule.training_step

    def interrupted(self: object, batch: object, index: int) -> object:
        if index == 2:
            signal.raise_signal(signal.SIGINT)
        return step(self, batch, index)  # type: ignore[arg-type]

    monkeypatch.setattr(training_module.RestorationModule, "training_step", interrupted)
    out = tmp_path / "tiny.safetensors"
    line = ["train", TINY, str(images), "-o", str(out), "--iterations", "50", "--patch", "16"]
    assert cli.main(line) == 130
    assert "Traceback" not in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


def test_unexpected_failure_is_code_1(
    image: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from qmir_ao.recipes import loading

    def fail(*args: object) -> None:
        raise RuntimeError("the [disk] is full")

    monkeypatch.setattr(loading, "load_model", fail)
    line = ["restore", str(image), str(image.with_name("out.png"))]
    assert cli.main(line) == 1
    error = capsys.readouterr().err
    assert "error: the [disk] is full" in error
    assert "Traceback" not in error
    assert cli.main(["-v", *line]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_doctor_finds_a_working_installation(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["healthy"]
    states = {check["name"]: check["state"] for check in report["checks"]}
    assert states["torch"] == "ok"
    assert sum(name.startswith("self-test") for name in states) >= 4
    assert cli.main(["doctor"]) == 0
    assert "self-test" in capsys.readouterr().out


def test_doctor_notices_a_wrong_kernel(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from qmir_ao.recipes import diagnose

    monkeypatch.setitem(diagnose.SELF_TESTS, "integer linear", lambda: False)
    assert cli.main(["doctor"]) == 1
    assert "WRONG RESULT" in capsys.readouterr().out
