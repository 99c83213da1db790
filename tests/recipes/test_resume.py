"""Resuming: equal bytes after any interruption, and nothing but our own checkpoints is accepted."""

import dataclasses
import multiprocessing
import os
import pickle
import random
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.training import Waves, run_here, run_until_killed, settings, upscaler
from torch import Tensor, nn

from qmir_ao.errors import CheckpointError, ConfigError
from qmir_ao.recipes import cli
from qmir_ao.recipes.checkpoint import read_weights
from qmir_ao.recipes.images import write_image
from qmir_ao.recipes.resume import (
    KEPT,
    discard_checkpoints,
    list_checkpoints,
    newest_checkpoint,
    read_checkpoint,
)
from qmir_ao.recipes.train import TrainOptions, fit
from qmir_ao.recipes.training_module import RestorationModule

OPTIONS = settings(iterations=9, save_every=2)
KILLS = 25


class Stop(Exception):
    """Ends a run from its progress callback."""


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(
    folder: Path,
    options: TrainOptions = OPTIONS,
    model: nn.Module | None = None,
    *,
    stop_at: int | None = None,
    resume: bool = False,
    data_seed: int = 0,
    **more: Any,
) -> nn.Module:
    """Train, raising Stop after step `stop_at`."""

    def watch(done: int, total: int, loss: float) -> None:
        if done == stop_at:
            raise Stop

    model = upscaler() if model is None else model
    data = Waves(options.batch * options.iterations, data_seed)
    fit(model, data, options, progress=watch, checkpoint_dir=folder, resume=resume, **more)
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Checkpoints of a float run that ended after step 5 of 9."""
    path = tmp_path / "checkpoints"
    with pytest.raises(Stop):
        run(path, stop_at=5)
    return path


@pytest.mark.parametrize(
    ("network", "changes"),
    [
        ({}, {}),
        ({"bits": 4}, {}),
        ({"bits": 2}, {"ema": 0.9}),
        ({"bits": 4, "preset": "official"}, {}),
        ({"bits": 4}, {"precision": "bf16-mixed"}),
    ],
    ids=["float", "w4a4", "w2a2 averaged", "official", "bf16"],
)
def test_resumed_run_ends_in_the_same_bytes(
    tmp_path: Path, network: dict[str, Any], changes: dict[str, Any]
) -> None:
    options = dataclasses.replace(OPTIONS, **changes)
    whole = upscaler(**network)
    expected = run_here(options, whole)
    with pytest.raises(Stop):
        run(tmp_path, options, upscaler(**network), stop_at=3)
    torch.rand(7)
    with pytest.raises(Stop):
        run(tmp_path, options, upscaler(**network), stop_at=8, resume=True)
    resumed = upscaler(**network)
    torch.manual_seed(99)
    result = fit(resumed, Waves(18), options, checkpoint_dir=tmp_path, resume=True)
    assert equal(resumed.state_dict(), whole.state_dict())
    assert (result.iterations, result.loss) == (expected.iterations, expected.loss)


def test_the_newest_two_are_kept_and_then_discarded(folder: Path) -> None:
    assert [path.name for path in list_checkpoints(folder)] == [
        "step-000000002.ckpt",
        "step-000000004.ckpt",
    ]
    (folder / ".step-000000006.ckpt.abc.part").write_bytes(b"half")
    run(folder, resume=True)
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["step-000000006.ckpt", "step-000000008.ckpt"]
    (folder / "notes.txt").write_text("mine")
    discard_checkpoints(folder)
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]
    (folder / "notes.txt").unlink()
    discard_checkpoints(folder)
    assert not folder.exists()


def test_an_unfinished_run_is_not_overwritten(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"step-000000004\.ckpt of an unfinished run"):
        run(folder)


def test_resume_without_a_checkpoint_starts(tmp_path: Path) -> None:
    fresh = run(tmp_path / "new" / "folder", resume=True)
    whole = upscaler()
    run_here(OPTIONS, whole)
    assert equal(fresh.state_dict(), whole.state_dict())


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"iterations": 10}, r"options\.iterations is 10 and was 9"),
        ({"batch": 1}, r"options\.batch"),
        ({"learning_rate": 0.5}, r"options\.learning_rate is 0\.5 and was 0\.001"),
        ({"warmup": 0}, r"options\.warmup"),
        ({"schedule": "steps"}, r"options\.schedule is 'steps' and was 'cosine'"),
        ({"clip": 0.5}, r"options\.clip"),
        ({"seed": 4}, r"options\.seed"),
        ({"precision": "bf16-mixed"}, r"options\.precision"),
        ({"ema": 0.5}, r"options\.ema"),
        ({"patch": 16}, r"options\.patch"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_changed_options_are_named(folder: Path, changes: dict[str, Any], key: str) -> None:
    before = [path.name for path in folder.iterdir()]
    with pytest.raises(ConfigError, match=key):
        run(folder, dataclasses.replace(OPTIONS, **changes), resume=True)
    assert [path.name for path in folder.iterdir()] == before


def test_changed_recipe_data_and_model_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"recipe\.task is 'sr' and was None"):
        run(folder, resume=True, recipe={"task": "sr"})
    with pytest.raises(ConfigError, match=r"data\.patches"):
        run(folder, resume=True, data_seed=1)
    with pytest.raises(ConfigError, match="model is"):
        run(folder, model=nn.Sequential(upscaler()), resume=True)
    quantized = tmp_path / "quantized"
    with pytest.raises(Stop):
        run(quantized, model=upscaler(bits=4), stop_at=3)
    with pytest.raises(
        ConfigError, match=r"quantizer\.\S+ is \"DLS.*bits=2.*and was \"DLS.*bits=4"
    ):
        run(quantized, model=upscaler(bits=2), resume=True)


def test_what_does_not_change_the_weights_may_change(folder: Path, tmp_path: Path) -> None:
    whole = upscaler()
    run_here(OPTIONS, whole)
    other = dataclasses.replace(OPTIONS, save_every=3, max_minutes=5, log_dir=tmp_path / "log")
    assert equal(run(folder, other, resume=True).state_dict(), whole.state_dict())


class Payload:
    """Creates a canary folder when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.canary),)


@pytest.mark.parametrize("kind", ["pickle", "torch", "truncated", "empty", "foreign", "no facts"])
def test_other_files_are_refused(folder: Path, tmp_path: Path, kind: str) -> None:
    newest, canary = newest_checkpoint(folder), tmp_path / "canary"
    assert newest is not None
    content = read_checkpoint(newest)
    if kind == "pickle":
        newest.write_bytes(pickle.dumps(Payload(canary)))
    elif kind == "torch":
        torch.save({**content, "callbacks": Payload(canary)}, newest)
    elif kind == "foreign":
        torch.save({"state_dict": {}}, newest)
    elif kind == "no facts":
        torch.save({**content, "qmir": {}}, newest)
    else:
        size = 0 if kind == "empty" else newest.stat().st_size * 2 // 3
        newest.write_bytes(newest.read_bytes()[:size])
    with pytest.raises(CheckpointError, match="step-000000004") as refused:
        run(folder, resume=True)
    assert not canary.exists()
    if kind != "no facts":
        told = "Remove step-000000004.ckpt to go on from step-000000002.ckpt instead"
        assert told in str(refused.value)
        newest.unlink()
        whole = upscaler()
        run_here(OPTIONS, whole)
        assert equal(run(folder, resume=True).state_dict(), whole.state_dict())


def test_a_full_disk_stops_the_run_and_harms_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(CheckpointError, match="No space left"):
            run(folder, resume=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_arguments_that_do_not_go_together(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="resume needs checkpoint_dir"):
        fit(upscaler(), Waves(18), OPTIONS, resume=True)
    with pytest.raises(ConfigError, match="needs save_every"):
        run(tmp_path, dataclasses.replace(OPTIONS, save_every=0))
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot be written"):
        run(tmp_path / "file")


@pytest.mark.parametrize("command", ["train", "quantize"])
def test_the_command_line_resumes(
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "images").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    write_image(tmp_path / "images" / "a.png", pixels)
    suffix = ".safetensors" if command == "train" else ""
    whole, out = (tmp_path / f"{name}{suffix}" for name in ("whole", "out"))
    size = ["--iterations", "4", "--batch", "1", "--patch", "16", "--save-every", "2"]
    line = [command, "mambair-tiny-x2", str(tmp_path / "images"), *size, "--ema", "0.5"]
    assert cli.main([*line, "-o", str(whole)]) == 0
    step = RestorationModule.training_step

    def interrupted(self: Any, batch: Any, index: int) -> Any:
        if index == 3:
            signal.raise_signal(signal.SIGINT)
        return step(self, batch, index)

    with monkeypatch.context() as patched:
        patched.setattr(RestorationModule, "training_step", interrupted)
        assert cli.main([*line, "-o", str(out)]) == 130
    assert not out.exists()
    assert [p.name for p in list_checkpoints(tmp_path / f"{out.name}.checkpoints")]
    assert cli.main([*line, "-o", str(out)]) == 2
    assert "--resume" in capsys.readouterr().err
    assert cli.main([*line, "-o", str(out), "--resume", "--lr", "0.1"]) == 2
    assert "options.learning_rate is 0.1 and was" in capsys.readouterr().err
    assert cli.main([*line, "-o", str(out), "--resume"]) == 0
    files = [path if command == "train" else path / "qat.safetensors" for path in (whole, out)]
    assert equal(*(read_weights(path) for path in files))
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["images", whole.name, out.name])


def noted(journal: Path) -> list[int]:
    """Steps that a life of a run has noted; the last line may be cut off."""
    return [int(line) for line in journal.read_text().split("\n")[:-1]] if journal.exists() else []


@pytest.mark.slow
def test_kills_at_random_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = settings(iterations=400, save_every=7)
    folder, journal = tmp_path / "checkpoints", tmp_path / "journal"
    result = tmp_path / "result.pt"
    whole = upscaler(bits=4)
    begin = time.monotonic()
    run_here(options, whole)
    step = (time.monotonic() - begin) / options.iterations
    # A fork server imports torch once; each child starts from there in milliseconds. It does not
    # take over sys.path before that import.
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["support.warm"])
    draw = random.Random(0)
    resumed = 0
    for _ in range(KILLS):
        journal.unlink(missing_ok=True)
        child = context.Process(target=run_until_killed, args=(folder, result, journal, options))
        child.start()
        lines = draw.randrange(1, 13)  # the first one is of the start, before any step
        while child.is_alive() and len(noted(journal)) < lines:
            child.join(step / 4)
        child.join(draw.uniform(0.0, 2 * step))
        child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL, "the run ended by itself"
        steps = noted(journal)
        resumed += len(steps) > 1 and steps[1] > 1
        newest = newest_checkpoint(folder)
        reached = 0 if newest is None else read_checkpoint(newest)["global_step"]
        assert len(list_checkpoints(folder)) <= KEPT + 1
        assert max(steps) - reached <= options.save_every
    assert resumed >= KILLS // 3
    last = context.Process(target=run_until_killed, args=(folder, result, journal, options))
    last.start()
    last.join()
    assert last.exitcode == 0
    assert equal(torch.load(result, weights_only=True), whole.state_dict())
