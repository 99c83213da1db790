"""Results as a table: rows of plain values, and the file that a measurement goes on from."""

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qmir_ao.errors import CheckpointError, ConfigError

FORMAT = 1
Row = dict[str, Any]


class Table:
    """Rows of a measurement and the facts that they belong to.

    Attributes:
        kind: what was measured, such as "sensitivity".
        rows: one dict for each row, all with the same keys; None stands for "no value" and for
            decibels without any noise.
        facts: what was measured on, and further results that are not of one row.
    """

    def __init__(self, kind: str, rows: Iterable[Row], facts: Mapping[str, Any]) -> None:
        """Copy the rows; see the class."""
        self.kind, self.rows, self.facts = kind, [dict(row) for row in rows], dict(facts)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    @property
    def columns(self) -> list[str]:
        """Names of the columns."""
        return list(self.rows[0]) if self.rows else []

    def column(self, name: str) -> list[Any]:
        """Values of one column.

        Raises:
            ConfigError: there is no such column.
        """
        if name not in self.columns:
            raise ConfigError(f"Table: no column {name!r}; its columns: {', '.join(self.columns)}")
        return [row[name] for row in self.rows]

    def sorted_by(self, name: str, *, descending: bool = False) -> "Table":
        """The same rows in the order of one column, those without value last."""
        values = self.column(name)
        known = [i for i, value in enumerate(values) if value is not None]
        order = sorted(known, key=lambda i: values[i], reverse=descending)
        order += [i for i, value in enumerate(values) if value is None]
        return Table(self.kind, [self.rows[i] for i in order], self.facts)

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """The table as a JSON document, written to `path` as well if there is one."""
        text = json.dumps(
            {"kind": self.kind, "format": FORMAT, "facts": self.facts, "rows": self.rows},
            indent=1,
            allow_nan=False,
        )
        if path is not None:
            write_atomically(Path(path), text + "\n")
        return text

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> "Table":
        """Read what `to_json` wrote.

        Raises:
            CheckpointError: the file is damaged or something else.
        """
        document = _read(Path(path))
        return cls(document["kind"], document["rows"], document["facts"])

    def __str__(self) -> str:
        """The rows as text: names to the left, numbers to the right."""
        if not self.rows:
            return f"{self.kind}: no rows"
        cells = [self.columns, *([_cell(v) for v in row.values()] for row in self.rows)]
        widths = [max(len(line[i]) for line in cells) for i in range(len(self.columns))]
        texts = [any(isinstance(v, str) for v in self.column(name)) for name in self.columns]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if text else cell.rjust(width)
                for cell, width, text in zip(line, widths, texts, strict=True)
            ).rstrip()
            for line in cells
        )


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def decibels(signal: float, noise: float) -> float | None:
    """10 log10(signal / noise); None where there is no noise, or no signal."""
    return 10 * math.log10(signal / noise) if noise > 0 and signal > 0 else None


class ResultsFile:
    """What a measurement has done so far; written whole or not at all after every part.

    Args:
        path: file to go on from and to write; None keeps everything in memory.
        kind: what is measured.
        facts: what it is measured on; another value of any of them makes the file another's.

    Raises:
        ConfigError: the file belongs to a measurement of something else.
        CheckpointError: the file is damaged or cannot be written.
    """

    def __init__(
        self, path: str | os.PathLike[str] | None, kind: str, facts: Mapping[str, Any]
    ) -> None:
        """Read the file if there is one; see the class."""
        self.path, self.kind = None if path is None else Path(path), kind
        self.facts: dict[str, Any] = json.loads(json.dumps(dict(facts)))
        self.done: dict[str, Any] = {}
        if self.path is not None and self.path.exists():
            self.done = self._read(self.path)

    def _read(self, path: Path) -> dict[str, Any]:
        document = _read(path)
        if document["kind"] != self.kind:
            raise ConfigError(
                f"{path} holds a measurement of {document['kind']!r}, not of {self.kind!r}; name "
                "another file"
            )
        saved = document["facts"]
        changed = [
            f"{key} is {self.facts[key]!r} and was {saved.get(key)!r}"
            for key in self.facts
            if saved.get(key) != self.facts[key]
        ]
        if changed:
            raise ConfigError(
                f"{path} was measured on something else: {'; '.join(changed)}. Go on with what it "
                "was made with, or name another file"
            )
        return dict(document.get("done", {}))

    def add(self, key: str, value: Any) -> None:
        """Record a finished part and write the file."""
        self.done[key] = value
        if self.path is not None:
            document = {"kind": self.kind, "format": FORMAT, "facts": self.facts, "rows": []}
            write_atomically(self.path, json.dumps(document | {"done": self.done}))

    def finish(self, table: Table) -> Table:
        """Write the table beside what it was made from, so that another call has it at once."""
        if self.path is not None:
            document = json.loads(table.to_json())
            write_atomically(self.path, json.dumps(document | {"done": self.done}, indent=1))
        return table


def _read(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as results ({error})") from error
    wanted = ("kind", "format", "facts", "rows")
    if not isinstance(document, dict) or any(key not in document for key in wanted):
        raise CheckpointError(f"{path}: holds no results of qmir_ao; name another file")
    if document["format"] != FORMAT:
        raise CheckpointError(
            f"{path}: format {document['format']!r} is not {FORMAT}; measure again"
        )
    return document


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that its name never shows half of it.

    Raises:
        CheckpointError: the folder is missing, read-only or full.
    """
    try:
        handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        try:
            with os.fdopen(handle, "w") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(scratch, 0o644)
            os.replace(scratch, path)
        except BaseException:
            Path(scratch).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({error})") from error


def digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Short hash of named tensors, values included."""
    found = hashlib.sha256()
    for name, value in tensors:
        flat = value.detach().cpu().contiguous()
        found.update(f"{name} {tuple(flat.shape)} {flat.dtype}".encode())
        found.update(flat.flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def model_digest(model: nn.Module) -> str:
    """Short hash of a network's class, layout and weights."""
    return f"{type(model).__name__}-{digest(sorted(model.state_dict().items()))}"


Batch = tuple[Tensor, Tensor | None]


def read_batches(data: Any, where: str) -> list[Batch]:
    """Inputs, each with its ground truth where the data brings one.

    Args:
        data: a tensor, or an iterable of tensors or of (input, ground truth) pairs.
        where: name of the caller, for the error.

    Raises:
        ConfigError: no batch, something else than tensors, or ground truth for some only.
    """
    batches = [_batch(item, where) for item in ([data] if isinstance(data, Tensor) else data)]
    if not batches:
        raise ConfigError(f"{where}: data holds no batch; pass at least one input tensor")
    if len({truth is None for _, truth in batches}) > 1:
        raise ConfigError(f"{where}: some batches have a ground truth and some have none")
    return batches


def _batch(item: Any, where: str) -> Batch:
    parts: Sequence[Any] = item if isinstance(item, list | tuple) else (item,)
    if len(parts) not in (1, 2) or not all(isinstance(x, Tensor) for x in parts):
        raise ConfigError(
            f"{where}: a batch must be an input tensor or a pair (input, ground truth), got "
            f"{type(item).__name__}"
            f"{f' of {len(parts)}' if isinstance(item, list | tuple) else ''}"
        )
    return parts[0], parts[1] if len(parts) == 2 else None


def batches_digest(batches: Sequence[Batch]) -> str:
    """Short hash of all inputs and ground truths."""
    return digest(
        (f"{i}.{j}", x)
        for i, batch in enumerate(batches)
        for j, x in enumerate(batch)
        if x is not None
    )
