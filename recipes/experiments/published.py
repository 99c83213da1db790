"""The paper's tables as data: `load_table("table8")`; the numbers are in `paper/*.yaml`."""

import functools
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator, model_validator

from qmir_ao.errors import ConfigError
from qmir_ao.recipes.yaml_source import parse_yaml

FOLDER = Path(__file__).resolve().parent / "paper"
METRICS = (
    "psnr",
    "ssim",
    "lpips",
    "parameters",
    "parameters_cut",
    "operations",
    "operations_cut",
    "latency",
)
FLOAT = "float"
"""Method of the rows without quantization."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Column(_Strict):
    """One column: `Set5:psnr`, `BSD68:psnr@15` with a noise level, or a metric without a set."""

    set: str | None
    metric: str
    sigma: int | None = None

    @classmethod
    def parse(cls, text: str) -> "Column":
        """Read the notation of the files.

        Raises:
            ValueError: unknown metric, or a sigma that is no number.
        """
        head, _, sigma = text.partition("@")
        name, colon, metric = head.partition(":")
        if not colon:
            name, metric = "", head
        if metric not in METRICS:
            raise ValueError(f"column {text!r}: metric must be one of {', '.join(METRICS)}")
        return cls(set=name or None, metric=metric, sigma=int(sigma) if sigma else None)

    def __str__(self) -> str:
        text = self.metric if self.set is None else f"{self.set}:{self.metric}"
        return text if self.sigma is None else f"{text}@{self.sigma}"


class Row(_Strict):
    """One row: a method on a network, and the printed numbers in the order of the columns.

    Attributes:
        part: of a table with parts.
        network: backbone, as the paper calls it.
        method: as the paper calls it; `FLOAT` without quantization.
        bits: of weights and activations, such as `4/4`.
        scale: enlargement of super-resolution.
        values: printed numbers, None where there is none.
        spread: printed standard deviations, in the order of `values`.
    """

    network: str
    method: str
    bits: str
    values: tuple[float | None, ...]
    part: str | None = None
    scale: int | None = None
    spread: tuple[float | None, ...] | None = None

    @field_validator("bits")
    @classmethod
    def _two_widths(cls, text: str) -> str:
        if not all(part.isdigit() for part in text.split("/")) or text.count("/") != 1:
            raise ValueError(f"bits must be like 4/4, got {text!r}")
        return text

    @property
    def widths(self) -> tuple[int, int]:
        """Bits of weights and of activations."""
        weight, act = self.bits.split("/")
        return int(weight), int(act)


class Doubt(_Strict):
    """Why some entries cannot be right.

    Attributes:
        rows: fields that a row must have, or lists of what is allowed for them.
        columns: columns that are meant; all if empty.
        reason: one sentence.
    """

    rows: dict[str, Any]
    reason: str
    columns: tuple[str, ...] = ()

    def covers(self, row: Row, column: Column) -> bool:
        """Whether an entry is in doubt."""
        if self.columns and str(column) not in self.columns:
            return False
        for field, wanted in self.rows.items():
            allowed = wanted if isinstance(wanted, list) else [wanted]
            if getattr(row, field) not in allowed:
                return False
        return True


class Table(_Strict):
    """One table of the paper."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    doubts: tuple[Doubt, ...] = ()
    note: str = ""

    @field_validator("columns", mode="before")
    @classmethod
    def _parse_columns(cls, given: Any) -> Any:
        return [Column.parse(text) if isinstance(text, str) else text for text in given]

    @model_validator(mode="after")
    def _consistent(self) -> "Table":
        if len(set(self.columns)) != len(self.columns):
            raise ValueError("a column is there twice")
        for row in self.rows:
            for numbers in (row.values, row.spread or row.values):
                if len(numbers) != len(self.columns):
                    raise ValueError(
                        f"row {row.network} {row.method} {row.bits}: {len(numbers)} numbers for "
                        f"{len(self.columns)} columns"
                    )
        for doubt in self.doubts:
            unknown = set(doubt.rows) - set(Row.model_fields)
            if unknown or not any(doubt.covers(r, c) for r in self.rows for c in self.columns):
                raise ValueError(f"a doubt covers no entry: {doubt.reason}")
        return self

    def reasons(self, row: Row, column: Column) -> list[str]:
        """Doubts about one entry."""
        return [doubt.reason for doubt in self.doubts if doubt.covers(row, column)]


def list_tables() -> list[str]:
    """Names of the tables, in the paper's order."""
    return sorted(
        (path.stem for path in FOLDER.glob("table*.yaml")),
        key=lambda name: int(name.removeprefix("table")),
    )


@functools.cache
def load_table(name: str) -> Table:
    """A table of the paper.

    Raises:
        ConfigError: unknown name, or a damaged file.
    """
    path = FOLDER / f"{name}.yaml"
    if not path.is_file():
        raise ConfigError(f"paper table {name!r} is unknown; known: {', '.join(list_tables())}")
    return parse_table(path.read_text(encoding="utf-8"), str(path))


def parse_table(text: str, where: str) -> Table:
    """Validate the text of a table file.

    Raises:
        ConfigError: no YAML, or not of a table's form.
    """
    data = parse_yaml(text, where).data
    try:
        return Table.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        keys = ".".join(str(key) for key in first["loc"])
        raise ConfigError(f"{where}: {keys or 'table'}: {first['msg']}") from error
