"""Options that several subcommands share."""

from typing import Annotated

import typer

Arch = Annotated[
    str | None,
    typer.Option(help="Architecture of a weights file, a name of the zoo.", show_default=False),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Batch = Annotated[int, typer.Option(help="Patches per step.")]
Iterations = Annotated[int, typer.Option(help="Optimizer steps.")]
LearningRate = Annotated[float, typer.Option("--lr", help="Highest learning rate of Adam.")]
Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="Name of the zoo, weights file (.safetensors, .pth) or folder of a lowered model.",
    ),
]
Patch = Annotated[int, typer.Option(help="Side of a low-resolution patch in pixels.")]
Seed = Annotated[int, typer.Option(help="Seed of every random draw.")]
