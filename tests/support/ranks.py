"""What each rank of a `torchrun` does in the tests: train, then restore a folder together.

torchrun --nproc_per_node 2 tests/support/ranks.py IMAGES OUT
"""

import sys
from pathlib import Path

import torch
from support.training import Waves, settings, upscaler, without_dropout

from qmir_ao.recipes import distributed
from qmir_ao.recipes.evaluate import evaluate
from qmir_ao.recipes.restore import restore
from qmir_ao.recipes.train import TrainOptions, fit

OPTIONS = TrainOptions(iterations=4, batch=4, patch=8, warmup=1, seed=3, ema=0.5, save_every=2)


class Stop(Exception):
    """Ends a run from its progress callback."""


def train(folder: Path, bits: int) -> torch.nn.Module:
    """Stop a run after its checkpoint, then resume it."""

    def stop(done: int, total: int, loss: float) -> None:
        if done == 3:
            raise Stop

    # Ranks that start from different weights must agree nevertheless.
    model = upscaler(bits=bits)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + distributed.rank())
    try:
        fit(model, Waves(16), OPTIONS, progress=stop, checkpoint_dir=folder)
    except Stop:
        model = upscaler(bits=bits)
    fit(model, Waves(16), OPTIONS, checkpoint_dir=folder, resume=True)
    return model


def main(images: Path, out: Path) -> None:
    """Train, restore and score; every rank leaves what it got in a file of its own."""
    torch.set_num_threads(1)
    rank = distributed.rank()
    model = train(out / "checkpoints", bits=4)
    quantized, plain = upscaler(bits=2), without_dropout()
    for network in (quantized, plain):
        fit(network, Waves(16), settings(iterations=3, save_every=0))
    report = restore(model.eval(), images, out / "restored", scale=2)
    scores = evaluate(model, images, scale=2)
    torch.save(
        {
            "model": model.state_dict(),
            "quantized": quantized.state_dict(),
            "plain": plain.state_dict(),
            "share": distributed.shard(list(range(7))),
            "gathered": distributed.gather(distributed.shard(list(range(7)))),
            "broadcast": distributed.broadcast(f"from {rank}"),
            "written": [path.name for path in report.written],
            "failed": [path.name for path in report.failed],
            "scored": [image.name for image in scores.images],
        },
        out / f"rank{rank}.pt",
    )
    distributed.wait()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
