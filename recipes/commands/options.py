"""Options that several subcommands share."""

from pathlib import Path
from typing import Annotated

import typer

Arch = Annotated[
    str | None,
    typer.Option(help="Architecture of a weights file, a name of the zoo.", show_default=False),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Batch = Annotated[int, typer.Option(help="Patches per step.")]
Ema = Annotated[
    float, typer.Option(help="Decay of a moving average of the weights, such as 0.999; 0 for none.")
]
Iterations = Annotated[int, typer.Option(help="Optimizer steps.")]
LearningRate = Annotated[float, typer.Option("--lr", help="Highest learning rate of Adam.")]
LogDir = Annotated[
    Path | None, typer.Option(help="Folder for TensorBoard's curves.", show_default=False)
]
Loss = Annotated[str, typer.Option(help="l1 or charbonnier.")]
Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="Name of the zoo, weights file (.safetensors, .pth) or folder of a lowered model.",
    ),
]
Patch = Annotated[int, typer.Option(help="Side of a low-resolution patch in pixels.")]
Precision = Annotated[str, typer.Option(help="32-true or bf16-mixed.")]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on from the newest checkpoint, if there is one.")
]
SaveEvery = Annotated[
    int, typer.Option(help="Steps between checkpoints in OUTPUT.checkpoints; 0 for none.")
]
Seed = Annotated[int, typer.Option(help="Seed of every random draw.")]
SkipBadImages = Annotated[
    bool,
    typer.Option("--skip-bad-images", help="Leave out training images that cannot be read."),
]


def checkpoint_folder(output: Path, save_every: int) -> Path | None:
    """Where the checkpoints of a run go: beside its output, so that a restart finds them."""
    return output.with_name(f"{output.name}.checkpoints") if save_every else None
