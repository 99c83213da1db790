"""What each experiment of the paper runs: its table's rows as networks, methods and settings.

A row whose method or network does not exist here keeps its place and says what is not built.
"""

import difflib
from dataclasses import dataclass, field, replace
from typing import Any

from qmir_ao.errors import ConfigError
from qmir_ao.recipes.experiments.published import FLOAT, Row, load_table

SCALES = ("tiny", "full")
NETWORK = "/"
"""What stands between a recipe and another network for it in the name of a bench."""

_OURS = {"preset": "paper"}
_PLAIN = {"preset": "paper", "granularity": "per_tensor"}
_OWN = {**_OURS, "constants": "own"}
Settings = tuple[str, dict[str, Any]]
"""Key of `METHODS` and changes to its settings."""

METHODS: dict[str, Settings] = {
    FLOAT: (FLOAT, {}),
    "LSQ": ("lsq-plain", _PLAIN),
    "QuantSR": ("quantsr-plain", _PLAIN),
    "Q-MambaIR": ("dls+rfa", _OURS),
    "Q-MambaIR, defaults here": ("dls+rfa", {}),
    # Table 5: its baseline is QuantSR, and a component replaces one half of it.
    "Baseline": ("quantsr-plain", _PLAIN),
    "DLS": ("dls+rfa", {**_OURS, "weight": "quantsr"}),
    "RFA": ("dls+rfa", {**_OWN, "activation": "quantsr"}),
    # Table 6: alpha and beta of a group decide, not the text.
    "GROUP1": ("dls+rfa", {**_OURS, "init": "mu3s"}),
    "GROUP2": ("dls+rfa", {**_OURS, "init": "mid3s"}),
    "GROUP3": ("dls+rfa", {**_OURS, "init": "mu_halfrange"}),
    "GROUP4": ("dls+rfa", {**_OURS, "init": "minmax"}),
    "mean and 4 sigma": ("dls+rfa", {**_OURS, "init": "mu4s"}),
}
"""How the paper calls a method to what it is here, always in the paper's form."""

_HALVES: dict[str, dict[str, Settings]] = {
    "activation": {
        "QuantSR": ("dls+rfa", {**_OWN, "activation": "quantsr"}),
        "LSQ+": ("dls+rfa", {**_OWN, "activation": "lsq+"}),
        "PAMS": ("dls+rfa", {**_OWN, "activation": "pams"}),
        "DLS": ("dls+rfa", _OURS),
    },
    "weight": {
        "STE": ("dls+rfa", {**_OURS, "weight": "ste"}),
        "Soft STE": ("dls+rfa", {**_OURS, "weight": "soft"}),
        "N2UQ": ("dls+rfa", {**_OURS, "weight": "n2uq"}),
        "RFA": ("dls+rfa", _OURS),
    },
}
"""Table 7: one half changes, by the part of the table."""


@dataclass(frozen=True)
class Budget:
    """How long the runs of scale `tiny` are.

    Attributes:
        iterations: steps of a quantized training.
        float_iterations: steps of the float training, where no weights are shipped.
        batch: patches per step.
        patch: side of the input patch.
        learning_rate: of the quantized training.
    """

    iterations: int = 500
    float_iterations: int = 1500
    batch: int = 4
    patch: int = 32
    learning_rate: float = 8e-4


@dataclass(frozen=True)
class Experiment:
    """One table or figure of the paper.

    Attributes:
        key: name on the command line.
        title: what it shows.
        table: name of the table whose rows it takes.
        recipes: the paper's name of a network to the bench of scale `full` (see `Part`); `{scale}`
            and `{sigma}` in it are those of the row and of the column.
        extra: rows that the paper does not have.
        only: what a row must have to be taken.
        overrides: changes to the recipe.
        sets: test sets that scale `full` must be given instead of all of the table; if empty, any.
        budget: of scale `tiny`.
        note: what a reader must know about our numbers.
        made_up: what scale `tiny` makes up where the user gives no images.
    """

    key: str
    title: str
    table: str
    recipes: dict[str, str] = field(default_factory=dict)
    extra: tuple[Row, ...] = ()
    only: dict[str, Any] = field(default_factory=dict)
    overrides: dict[str, Any] = field(default_factory=dict)
    sets: tuple[str, ...] | None = None
    budget: Budget = Budget()
    note: str = ""
    made_up: str = ""

    def rows(self) -> list[Row]:
        """Rows of the paper that belong here, then those that it does not have."""
        chosen = [
            row
            for row in load_table(self.table).rows
            if all(
                getattr(row, name) in (wanted if isinstance(wanted, tuple) else (wanted,))
                for name, wanted in self.only.items()
            )
        ]
        return [*chosen, *self.extra]


@dataclass(frozen=True)
class Part:
    """What one row runs on one bench.

    Attributes:
        bench: recipe of scale `full`, as `name`, `name@sigma` or `name/network`.
        method: `FLOAT` or a key of the methods.
        settings: changes to the method's settings.
        bits: of weights and activations.
    """

    bench: str
    method: str
    settings: dict[str, Any]
    bits: tuple[int, int]


@dataclass(frozen=True)
class Line:
    """One row of the output.

    Attributes:
        row: the paper's row; without values where it is ours alone.
        parts: by noise level, None where there is one bench only.
        missing: why nothing runs, or empty.
    """

    row: Row
    parts: dict[int | None, Part] = field(default_factory=dict)
    missing: str = ""


def _own(table: str, network: str, method: str, bits: str, scale: int | None = None) -> Row:
    """A row that the paper does not have."""
    values = (None,) * len(load_table(table).columns)
    return Row(network=network, method=method, bits=bits, scale=scale, values=values)


def _defaults(table: str, network: str, scale: int) -> tuple[Row, ...]:
    name = "Q-MambaIR, defaults here"
    return tuple(_own(table, network, name, bits, scale) for bits in ("4/4", "2/2"))


_LIGHT = {"MambaIR-light": "light-sr-x{scale}"}
_CLASSIC = {"MambaIR": "classic-sr-x{scale}"}
REDUCED_BUDGET = Budget(iterations=200, float_iterations=1500, batch=4, patch=32)
"""For small networks without shipped weights."""
_REDUCED_UNET = Budget(iterations=150, float_iterations=1000, batch=2, patch=32)

EXPERIMENTS = {
    experiment.key: experiment
    for experiment in (
        Experiment(
            "table1",
            "Classic super-resolution",
            "table1",
            {**_CLASSIC, "MambaIRv2": "classic-sr-x{scale}/mambairv2-x{scale}"},
            extra=_defaults("table1", "MambaIR", 2),
        ),
        Experiment(
            "table2",
            "JPEG artifact reduction, quality 30",
            "table2",
            {"MambaIR": "jpeg"},
            budget=REDUCED_BUDGET,
        ),
        Experiment(
            "table3",
            "Real denoising",
            "table3",
            {"MambaIR-UNet": "real-denoise"},
            budget=_REDUCED_UNET,
            note="The network is MambaIR's U-Net; at scale `tiny` with one block on each level.",
            made_up="The noise of our pairs is synthetic: Gaussian, stronger where a pixel is "
            "brighter, added to scikit-image's photos. No camera made it.",
        ),
        Experiment(
            "table4",
            "Complexity",
            "table4",
            {**_LIGHT, **_CLASSIC},
            note="Ours count every parameter, and 9 operations per position, channel and state of "
            "a scan; packed weights and scales count by their bytes.",
        ),
        Experiment("table5", "Components of Q-MambaIR", "table5", _LIGHT),
        Experiment(
            "table6",
            "Initialisation of DLS",
            "table6",
            _LIGHT,
            extra=(
                _own("table6", "MambaIR-light", "mean and 4 sigma", "4/4", 2),
                _own("table6", "MambaIR-light", FLOAT, "32/32", 2),
            ),
        ),
        Experiment(
            "table7",
            "Activation and weight quantizers",
            "table7",
            _LIGHT,
            extra=(_own("table7", "MambaIR-light", FLOAT, "32/32", 2),),
            overrides={"train.iterations": 10000},
        ),
        Experiment(
            "table8",
            "Lightweight super-resolution",
            "table8",
            _LIGHT,
            extra=_defaults("table8", "MambaIR-light", 2),
        ),
        Experiment(
            "table9",
            "Super-resolution x4 with SwinIR and EDSR",
            "table9",
            {
                "SwinIR": "light-sr-x{scale}/swinir-light-x{scale}",
                "EDSR": "light-sr-x{scale}/edsr-baseline-x{scale}",
            },
            budget=REDUCED_BUDGET,
            note="The paper does not say which SwinIR and EDSR these are; here the light one, and "
            "the one with 16 blocks of 64 features; at scale `tiny` small ones of both.",
        ),
        Experiment(
            "table10",
            "Gaussian colour denoising",
            "table10",
            {"MambaIR": "denoise@{sigma}"},
            budget=REDUCED_BUDGET,
        ),
        Experiment(
            "fig2",
            "Quality against size, super-resolution x2",
            "table8",
            _LIGHT,
            only={"scale": 2, "method": (FLOAT, "LSQ", "QuantSR", "Q-MambaIR")},
            sets=("Urban100",),
        ),
        Experiment(
            "fig3",
            "Outliers around the selective scans of the float network",
            "table8",
            _LIGHT,
            only={"scale": 2, "method": FLOAT},
            sets=(),
        ),
        Experiment(
            "fig5",
            "Outputs of the selective scans at 2 bits",
            "table8",
            _LIGHT,
            only={"scale": 2, "method": ("QuantSR", "Q-MambaIR"), "bits": "2/2"},
            sets=(),
        ),
    )
}
"""All experiments by name, in the order of the paper."""


COMPARISON = Experiment(
    "qat-x2",
    "Quantization methods on x2 super-resolution",
    "table8",
    budget=Budget(iterations=500, learning_rate=1.6e-3),
)
"""No table of the paper: every method of `experiments.methods` on the tiny network."""


def get_experiment(key: str) -> Experiment:
    """The experiment of that name.

    Raises:
        ConfigError: unknown name, with a suggestion.
    """
    known = {**EXPERIMENTS, COMPARISON.key: COMPARISON}
    if key not in known:
        close = difflib.get_close_matches(key, known, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ConfigError(f"experiment {key!r} is unknown; {hint}known: {', '.join(known)}")
    return known[key]


def lines(experiment: Experiment) -> list[Line]:
    """What each row of an experiment runs, or why it does not."""
    columns = load_table(experiment.table).columns
    sigmas = list(dict.fromkeys(column.sigma for column in columns))
    return [_line(experiment, row, sigmas) for row in experiment.rows()]


def _line(experiment: Experiment, row: Row, sigmas: list[int | None]) -> Line:
    known = _HALVES[row.part] if row.part is not None else METHODS
    lacking = []
    if row.network not in experiment.recipes:
        lacking.append(f"network {row.network}")
    if row.method not in known:
        lacking.append(f"method {row.method}")
    if lacking:
        return Line(row, missing=f"not built: {', '.join(lacking)}")
    method, settings = known[row.method]
    template = experiment.recipes[row.network]
    parts = {
        sigma: Part(template.format(scale=row.scale, sigma=sigma), method, settings, row.widths)
        for sigma in sigmas
    }
    return Line(row, parts)


def without(line: Line, reason: str) -> Line:
    """The same row, not run."""
    return replace(line, parts={}, missing=reason)
