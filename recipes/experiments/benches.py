"""Networks, images and settings of an experiment's runs, at scale `tiny` or `full`."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from qmir_ao.errors import ConfigError
from qmir_ao.recipes.checkpoint import digest_weights
from qmir_ao.recipes.experiments.published import FLOAT, load_table
from qmir_ao.recipes.experiments.registry import (
    NETWORK,
    REDUCED_BUDGET,
    SCALES,
    Budget,
    Experiment,
    Line,
    get_experiment,
    lines,
    without,
)
from qmir_ao.recipes.experiments.runs import Bench
from qmir_ao.recipes.experiments.tiny_data import (
    SET_NAME,
    Progress,
    default_data,
    is_reducible,
    listing,
    reduced_network,
)
from qmir_ao.recipes.models import create_model
from qmir_ao.recipes.run import initial_model
from qmir_ao.recipes.schema import Recipe, load_recipe
from qmir_ao.recipes.tasks import Task

SEEDS = (0, 1, 2)
TILE = 200
"""Section length of the published evaluation."""
TINY = "mambair-tiny-x2"
TINY_SCALE = 2
SERVER_ONLY = ("DND",)
"""Sets without public ground truth."""


@dataclass(frozen=True)
class TestSet:
    """A folder with test images under the paper's name.

    Attributes:
        name: column of the table.
        folder: ground truth; None leaves the set out.
        inputs: folder with inputs, `{scale}` in it standing for the enlargement; made if None.
    """

    __test__ = False

    name: str
    folder: Path | None
    inputs: str | None = None

    @classmethod
    def parse(cls, text: str) -> "TestSet":
        """Read `NAME=FOLDER[:INPUTS]`, or `NAME=none`.

        Raises:
            ConfigError: another form.
        """
        name, sign, rest = text.partition("=")
        folder, _, inputs = rest.partition(":")
        if not (name and sign and folder):
            raise ConfigError(
                f"--sets {text}: must be NAME=FOLDER, NAME=FOLDER:INPUTS or NAME=none"
            )
        return cls(name, None if folder == "none" else Path(folder), inputs or None)

    def pair(self, task: Task) -> tuple[Path, Path | None]:
        """Folders of ground truth and of inputs for a task."""
        assert self.folder is not None
        low = None if self.inputs is None else self.inputs.replace("{scale}", str(task.scale))
        return self.folder, None if low is None else Path(low)


@dataclass(frozen=True)
class Request:
    """What `qmir reproduce` was asked for; plain data, because other processes get it.

    Attributes:
        experiment: name of the experiment.
        output: folder that holds all runs and results.
        scale: "tiny" or "full".
        train: folders with training images.
        sets: test sets.
        weights: float weights by bench (`light-sr-x2`, `denoise@15`), for scale `full`; None
            leaves the rows of that bench out.
        seeds: of the runs.
        iterations: steps of the quantized training instead of the experiment's.
        float_iterations: steps of the float training of scale `tiny` instead of the experiment's.
        skip_bad_images: leave out training images that cannot be read.
    """

    experiment: str
    output: Path
    scale: str = "tiny"
    train: tuple[Path, ...] = ()
    sets: tuple[TestSet, ...] = ()
    weights: dict[str, Path | None] = field(default_factory=dict)
    seeds: tuple[int, ...] = SEEDS
    iterations: int | None = None
    float_iterations: int | None = None
    skip_bad_images: bool = False


@dataclass(frozen=True)
class OpenBench:
    """A bench, where its records are, how long a run is, and what to tell about it."""

    bench: Bench
    folder: Path
    budget: Budget
    facts: dict[str, Any]


def plan(request: Request) -> list[Line]:
    """Rows of the experiment; what this scale cannot run says why.

    Raises:
        ConfigError: unknown experiment or scale, no seed, or data or weights that `full` needs are
            missing (all of them are named).
    """
    experiment = get_experiment(request.experiment)
    if request.scale not in SCALES:
        raise ConfigError(f"--scale must be one of {', '.join(SCALES)}, got {request.scale!r}")
    if not request.seeds or min(request.seeds) < 0:
        raise ConfigError(f"--seeds must be whole numbers from 0, got {request.seeds}")
    planned = lines(experiment)
    if request.scale == "full":
        planned = [_full_line(line, request) for line in planned]
        _check_full(request, experiment, planned)
        return planned
    scales: dict[str, set[int]] = {}
    for line in planned:
        if line.row.scale is not None:
            scales.setdefault(line.row.network, set()).add(line.row.scale)
    return [_tiny(line, min(scales.get(line.row.network, {TINY_SCALE}))) for line in planned]


def _tiny(line: Line, smallest: int) -> Line:
    """A line, left out where this scale has no network or another enlargement for it."""
    if line.missing:
        return line
    networks = {part.bench.partition(NETWORK)[2] for part in line.parts.values()} - {""}
    if not all(map(is_reducible, networks)):
        return without(line, f"not run: scale tiny has no small {line.row.network}")
    scale = smallest if networks else TINY_SCALE
    if line.row.scale not in (None, scale):
        return without(line, f"not run: the tiny network enlarges {scale} times")
    return line


def _full_line(line: Line, request: Request) -> Line:
    left_out = {name for name, path in request.weights.items() if path is None}
    if left_out & {part.bench for part in line.parts.values()}:
        return without(line, "not run: its float weights were left out")
    return line


def bench_names(planned: list[Line]) -> list[str]:
    """The benches that some row needs."""
    return list(dict.fromkeys(part.bench for line in planned for part in line.parts.values()))


def bench_recipe(name: str, overrides: dict[str, Any] | None = None) -> Recipe:
    """Recipe of a bench: `x`, `x@15` with a noise level, or `x/y` with network y."""
    recipe, _, sigma = name.partition("@")
    recipe, _, network = recipe.partition(NETWORK)
    given = dict(overrides or {})
    if network:
        given["model.name"] = network
    if sigma:
        given["task.sigma"] = float(sigma)
    return load_recipe(recipe, given)


def _check_full(request: Request, experiment: Experiment, planned: list[Line]) -> None:
    """Everything that is missing, in one error."""
    names = bench_names(planned)
    if not names:
        return
    trained = any(part.method != FLOAT for line in planned for part in line.parts.values())
    missing = []
    if trained and not request.train:
        missing.append("training images: --train FOLDER")
    missing += [f"{f}: no such folder (--train)" for f in request.train if not f.is_dir()]
    missing += _missing_sets(request, experiment)
    for test in request.sets:
        if test.folder is not None and not test.folder.exists():
            missing.append(f"{test.folder}: no such folder (--sets {test.name}=...)")
    for name in names:
        path = request.weights.get(name)
        if path is None and bench_recipe(name).model.weights is None:
            missing.append(f"float weights: --weights {name}=FILE")
        elif path is not None and not path.is_file():
            missing.append(f"{path}: no such file (--weights {name}=...)")
    if missing:
        raise ConfigError(
            f"reproduce {experiment.key} --scale full lacks {len(missing)} of what it needs:\n  "
            + "\n  ".join(missing)
            + "\nGive them, or run --scale tiny, which needs none."
        )


def _missing_sets(request: Request, experiment: Experiment) -> list[str]:
    columns = load_table(experiment.table).columns
    wanted = experiment.sets
    if wanted is None:
        wanted = tuple(c.set for c in columns if c.set is not None and c.set not in SERVER_ONLY)
    if not wanted and not any(test.folder for test in request.sets):
        return ["test images: --sets NAME=FOLDER[:INPUTS]"]
    known = {test.name.casefold() for test in request.sets}
    return [
        f"test set {name}: --sets {name}=FOLDER[:INPUTS] (or {name}=none)"
        for name in dict.fromkeys(wanted)
        if name.casefold() not in known
    ]


def open_bench(name: str, request: Request, progress: Progress | None = None) -> OpenBench:
    """Load network and folders of a bench; the tiny one may train its float network first."""
    experiment = get_experiment(request.experiment)
    if request.scale == "full":
        network, bench, budget = _full(name, request, experiment)
    else:
        network, bench, budget = _tiny_bench(name, request, experiment, progress)
    task = bench.restoration
    facts = {
        "network": network,
        "parameters": sum(p.numel() for p in bench.model.parameters()),
        "weights": digest_weights(bench.model),
        "task": task.title,
        "train": listing(bench.folders),
        "sets": {
            key: listing([folder, *([low] if low else [])])
            for key, (folder, low) in bench.sets.items()
        },
        "clip": bench.clip,
        "tile": bench.tile,
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
    folder = request.output / "runs" / f"{network}-{task.name}-{digest}"
    facts |= {
        "train": [str(f) for f in bench.folders],
        "sets": {key: [str(f) for f in pair if f] for key, pair in bench.sets.items()},
        "folder": str(folder.relative_to(request.output)),
    }
    return OpenBench(bench, folder, budget, facts)


def _full(name: str, request: Request, experiment: Experiment) -> tuple[str, Bench, Budget]:
    overrides = dict(experiment.overrides)
    if request.weights.get(name) is not None:
        overrides["model.weights"] = str(request.weights[name])
    recipe = bench_recipe(name, overrides)
    train = recipe.train
    budget = Budget(
        iterations=request.iterations or train.iterations,
        batch=train.batch,
        patch=train.patch,
        learning_rate=train.learning_rate,
    )
    sets = {test.name: test.pair(recipe.task) for test in request.sets if test.folder is not None}
    model = initial_model(recipe).eval()
    skip = request.skip_bad_images
    bench = _bench(model, list(request.train), sets, recipe.task, train.clip, TILE, skip)
    return recipe.model.name, bench, budget


def _tiny_bench(
    name: str, request: Request, experiment: Experiment, progress: Progress | None
) -> tuple[str, Bench, Budget]:
    task = bench_recipe(name).task
    wanted = name.partition(NETWORK)[2]
    # A second network of a table must not double its hour.
    given = REDUCED_BUDGET if wanted else experiment.budget
    budget = Budget(
        iterations=request.iterations or given.iterations,
        float_iterations=request.float_iterations or given.float_iterations,
        batch=given.batch,
        patch=given.patch,
        learning_rate=given.learning_rate,
    )
    train, test = list(request.train), [t for t in request.sets if t.folder is not None]
    if not train or not test:
        photos, held_out = default_data(task, request.output / "data")
        train = train or [photos]
        test = test or [TestSet(SET_NAME, held_out)]
    if task.scale > 1 and not wanted:
        network, model = TINY, create_model(TINY, pretrained=True).eval()
    else:
        cache, skip = request.output / "networks", request.skip_bad_images
        network, model = reduced_network(task, train, budget, cache, progress, skip, wanted)
    sets = {t.name: t.pair(task) for t in test}
    return network, _bench(model, train, sets, task, skip=request.skip_bad_images), budget


def _bench(
    model: nn.Module,
    train: list[Path],
    sets: dict[str, tuple[Path, Path | None]],
    task: Task,
    clip: float = 1.0,
    tile: int | None = None,
    skip: bool = False,
) -> Bench:
    # A wrong folder or a damaged image must not show after an hour of training.
    for folder, low in sets.values():
        task.check_sources(folder, low)
    return Bench(
        model, train, sets, task.scale, task=task, clip=clip, tile=tile, skip_bad_images=skip
    )
