"""Weights files: published wrappers, other architectures, damaged and hostile files."""

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from qmir_ao.errors import CheckpointError
from qmir_ao.recipes.checkpoint import (
    load_checkpoint,
    read_metadata,
    read_weights,
    save_weights,
)
from qmir_ao.recipes.models.mambair import MambaIR


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 3, 3))


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(
        torch.equal(x, y)
        for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("wrapper", [None, "params", "params_ema", "state_dict"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_published_pth_loads(tmp_path: Path, wrapper: str | None, prefix: str) -> None:
    source, target = net(), net()
    state: dict[str, Any] = {prefix + key: value for key, value in source.state_dict().items()}
    torch.save({wrapper: state} if wrapper else state, tmp_path / "net.pth")
    load_checkpoint(target, tmp_path / "net.pth")
    assert equal(source, target)


def test_params_win_over_params_ema(tmp_path: Path) -> None:
    source, other, target = net(), net(), net()
    content = {"params_ema": other.state_dict(), "params": source.state_dict()}
    torch.save(content, tmp_path / "net.pth")
    load_checkpoint(target, tmp_path / "net.pth")
    assert equal(source, target)


def test_legacy_pth_loads(tmp_path: Path) -> None:
    source, target = net(), net()
    torch.save(source.state_dict(), tmp_path / "net.pth", _use_new_zipfile_serialization=False)
    load_checkpoint(target, tmp_path / "net.pth")
    assert equal(source, target)


def test_saved_weights_come_back_with_metadata(tmp_path: Path) -> None:
    source, target = net(), net()
    save_weights(source, tmp_path / "net.safetensors", {"model": "n", "steps": 3})
    load_checkpoint(target, tmp_path / "net.safetensors")
    assert equal(source, target)
    assert read_metadata(tmp_path / "net.safetensors") == {"model": "n", "steps": "3"}


def mambair(scale: int, upsampler: str, embed_dim: int) -> MambaIR:
    return MambaIR(
        scale=scale, upsampler=upsampler, embed_dim=embed_dim, depths=(1,), d_state=2, expand=1.0
    )


def test_other_architecture_names_first_keys(tmp_path: Path) -> None:
    torch.save({"params": mambair(2, "pixelshuffle", 36).state_dict()}, tmp_path / "x2.pth")
    light = mambair(2, "pixelshuffledirect", 30)
    before = {key: value.clone() for key, value in light.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(light, tmp_path / "x2.pth")
    message = str(caught.value)
    assert "missing keys: layers.0.residual_group.blocks.0.conv_blk.cab.1.weight" in message
    assert "unexpected keys: layers.0.residual_group.blocks.0.conv_blk.cab.2.weight" in message
    assert "conv_first.weight is (36, 3, 3, 3) in the file, (30, 3, 3, 3)" in message
    assert "and 7 more; 10 unexpected" in message
    assert all(torch.equal(before[key], value) for key, value in light.state_dict().items())


def test_another_scale_is_refused_and_not_loaded_in_part(tmp_path: Path) -> None:
    save_weights(mambair(3, "pixelshuffledirect", 30), tmp_path / "x3.safetensors")
    with pytest.raises(CheckpointError, match=r"upsample\.0\.weight is .27, 30, 3, 3."):
        load_checkpoint(mambair(2, "pixelshuffledirect", 30), tmp_path / "x3.safetensors")


class Payload:
    """Creates a canary file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.canary),)


@pytest.mark.parametrize("raw", [True, False], ids=["bare pickle", "torch file"])
def test_pickle_that_runs_code_is_refused(tmp_path: Path, raw: bool) -> None:
    canary, path = tmp_path / "canary", tmp_path / "evil.pth"
    if raw:
        path.write_bytes(pickle.dumps({"params": Payload(canary)}))
    else:
        torch.save({"params": Payload(canary)}, path)
    with pytest.raises(CheckpointError, match="refused"):
        read_weights(path)
    assert not canary.exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"not a file of weights", b"PK\x03\x04", b"\x80\x02}q\x00."],
    ids=["empty", "text", "half zip", "empty dict"],
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_junk_is_refused(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"junk{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="junk"):
        read_weights(path)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_every_truncation_and_many_flips_are_refused_or_read(tmp_path: Path, suffix: str) -> None:
    path, broken = tmp_path / f"net{suffix}", tmp_path / f"broken{suffix}"
    state = {"weight": torch.arange(6.0), "bias": torch.ones(2)}
    if suffix == ".pth":
        torch.save(state, path)
    else:
        save_file(state, path)
    data = path.read_bytes()
    refused = 0
    cuts = [data[:size] for size in range(0, len(data) - 1, max(len(data) // 40, 1))]
    flips = []
    for position in range(0, len(data), max(len(data) // 150, 1)):
        changed = bytearray(data)
        changed[position] ^= 0x55
        flips.append(bytes(changed))
    for content in cuts + flips:
        broken.write_bytes(content)
        try:
            read_weights(broken)
        except CheckpointError:
            refused += 1
    assert refused >= len(cuts)


def test_a_file_without_tensors_is_refused(tmp_path: Path) -> None:
    torch.save({"params": {"weight": 3}}, tmp_path / "number.pth")
    with pytest.raises(CheckpointError, match="'weight' is not a tensor"):
        read_weights(tmp_path / "number.pth")
    torch.save([torch.ones(1)], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match="a list"):
        read_weights(tmp_path / "list.pth")


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        read_weights(tmp_path / "absent.pth")


def test_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "net.safetensors"
    save_weights(net(), path)
    before = path.read_bytes()

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left"):
        save_weights(net(), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(CheckpointError, match="cannot be written"):
        save_weights(net(), tmp_path / "absent" / "net.safetensors")
