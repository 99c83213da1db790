"""Two ranks of a torchrun on the CPU: equal bytes everywhere, each image once."""

import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.training import Waves, settings, upscaler, without_dropout

from qmir_ao.errors import ConfigError
from qmir_ao.recipes import distributed
from qmir_ao.recipes.checkpoint import read_weights
from qmir_ao.recipes.images import write_image
from qmir_ao.recipes.lightning_run import Shares
from qmir_ao.recipes.train import fit

TESTS = Path(__file__).resolve().parents[1]


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Start two ranks."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    environment = {**os.environ, "PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*launcher, "--nproc_per_node", "2", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
        env=environment,
    )


def make_images(folder: Path) -> Path:
    """Three images, and a file that is none."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in ("a", "c", "d"):
        write_image(folder / f"{name}.png", rng.integers(0, 256, (24, 20, 3), dtype=np.uint8))
    return folder


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """What the two ranks of support/ranks.py ended with."""
    out = tmp_path_factory.mktemp("ranks")
    images = make_images(out / "images")
    done = torchrun(str(TESTS / "support" / "ranks.py"), str(images), str(out))
    assert done.returncode == 0, done.stderr[-4000:]
    return out, [torch.load(out / f"rank{i}.pt", weights_only=True) for i in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("which", ["model", "quantized"])
def test_all_ranks_end_with_equal_bytes(
    ranks: tuple[Path, list[dict[str, Any]]], which: str
) -> None:
    first, second = (rank[which] for rank in ranks[1])
    assert first.keys() == second.keys()
    assert all(first[key].numpy().tobytes() == second[key].numpy().tobytes() for key in first)
    assert any(key.endswith("thresholds") for key in first)
    assert all(value.all() for key, value in first.items() if key.endswith("initialized"))


@pytest.mark.slow
def test_ranks_make_the_steps_of_one_process(ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    alone = without_dropout()
    fit(alone, Waves(16), settings(iterations=3, save_every=0))
    for key, expected in alone.state_dict().items():
        # The mean of two halves rounds differently from the mean of the whole.
        torch.testing.assert_close(ranks[1][0]["plain"][key], expected, rtol=0, atol=1e-5)
    assert not torch.equal(alone.state_dict()["last.bias"], upscaler().state_dict()["last.bias"])


@pytest.mark.slow
def test_ranks_share_restoring_and_scoring(ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    out, results = ranks
    for rank, result in enumerate(results):
        assert result["share"] == list(range(7))[rank::2]
        assert result["gathered"] == list(range(7))
        assert result["broadcast"] == "from 0"
        assert result["written"] == ["a.png", "c.png", "d.png"] and not result["failed"]
        assert result["scored"] == ["a.png", "c.png", "d.png"]
    assert sorted(path.name for path in (out / "restored").iterdir()) == ["a.png", "c.png", "d.png"]


@pytest.mark.slow
def test_the_command_line_trains_on_two_ranks(tmp_path: Path) -> None:
    images, out = make_images(tmp_path / "images"), tmp_path / "tiny.safetensors"
    line = f"train mambair-tiny-x2 {images} -o {out} --iterations 2 --batch 2 --patch 8 --json"
    done = torchrun("-m", "qmir_ao.recipes.cli", *line.split())
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count('"iterations": 2,') == 2  # once as a fact, once as an option
    assert all(value.isfinite().all() for value in read_weights(out).values())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "tiny.safetensors"]


def as_rank(monkeypatch: pytest.MonkeyPatch, rank: str, size: str) -> None:
    values = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    for name, value in {**values, "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)


def test_a_process_of_its_own_is_rank_0_of_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")  # some clusters set this without torchrun
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    assert distributed.shard([1, 2, 3]) == [1, 2, 3] == distributed.gather([1, 2, 3])
    assert distributed.broadcast("x") == "x"
    distributed.wait()


def test_shares_make_up_every_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    shares = []
    for rank in range(3):
        as_rank(monkeypatch, str(rank), "3")
        shares.append(list(Shares(items=100, batch=6, steps=4, first=1)))
    for step, parts in enumerate(zip(*shares, strict=True), start=1):
        assert list(itertools.chain(*parts)) == list(range(6 * step, 6 * step + 6))
    with pytest.raises(ConfigError, match="batch of 4 cannot be shared evenly by 3 ranks"):
        Shares(items=100, batch=4, steps=4, first=0)


@pytest.mark.parametrize(("rank", "size"), [("-1", "2"), ("x", "2"), ("0", "0"), ("", "2")])
def test_a_broken_environment_is_named(
    monkeypatch: pytest.MonkeyPatch, rank: str, size: str
) -> None:
    as_rank(monkeypatch, rank, size)
    with pytest.raises(ConfigError, match="must be a whole number"):
        distributed.shard(range(3))
