"""Why a lowered model is what it is: what each pass changed, and what became of each operator."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from qmir_ao.backend.lowered import LoweredModule
from qmir_ao.backend.report import LoweringReport
from qmir_ao.errors import ConfigError
from qmir_ao.passes.record import PassRecord

_NAME = re.compile(r"[A-Za-z_]\w{0,99}")
_OPERATOR = re.compile(r"\w[\w.]{0,199}")
_PATH = re.compile(r"[\w.*]{0,999}")
COLUMNS = ("operator", "module", "runs on", "weights", "activations", "bytes", "reason")


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What `explain` returns.

    Attributes:
        target: of the model.
        passes: every pass in the order in which it ran, those before the preparation included.
        report: the operators.
    """

    target: str
    passes: tuple[PassRecord, ...]
    report: LoweringReport

    def operators(self) -> list[dict[str, Any]]:
        """One row for each operator, integer ones first, with the keys of `COLUMNS`.

        `weights` and `activations` are bits; `bytes` those of packed weights and their scales.
        """
        rows = [
            {
                "operator": r.kind,
                "module": r.module,
                "runs on": "integers",
                "weights": r.weight_bits,
                "activations": r.act_bits,
                "bytes": r.weight_bytes + r.scale_bytes,
                "reason": None,
            }
            for r in self.report.operators
        ]
        return rows + [
            {
                "operator": r.op,
                "module": r.module,
                "runs on": "float",
                "weights": None,
                "activations": None,
                "bytes": None,
                "reason": r.reason,
            }
            for r in self.report.left_in_float
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        return {
            "target": self.target,
            "passes": [dataclasses.asdict(record) for record in self.passes],
            "operators": self.operators(),
            "float_parameter_bytes": self.report.float_parameter_bytes,
        }

    def __str__(self) -> str:
        """Passes, then the operator table."""
        lines = [f"passes for target {self.target!r}, in their order"]
        if not self.passes:
            lines.append("  no record: the model was saved by a release that kept none")
        for record in self.passes:
            lines += [f"  {line}" for line in str(record).splitlines()]
        rows = [[_text(row[c]) for c in COLUMNS] for row in self.operators()]
        widths = [max(len(x) for x in column) for column in zip(COLUMNS, *rows, strict=True)]
        lines += ["", f"{len(self.report.operators)} operators on integer codes, "]
        lines[-1] += f"{len(self.report.left_in_float)} in float"
        for row in (COLUMNS, *rows):
            cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            lines.append("  ".join(cells).rstrip())
        lines.append(f"parameters in float: {self.report.float_parameter_bytes} bytes")
        return "\n".join(lines)


def _text(value: Any) -> str:
    return "-" if value is None else str(value) or "(root)"


def explain_lowered(lowered: LoweredModule) -> Explanation:
    """The explanation of a lowered model, made here or loaded.

    Raises:
        ConfigError: it is no lowered model.
    """
    if not isinstance(lowered, LoweredModule):
        raise ConfigError(
            f"explain needs what convert_and_lower or load returns, got {type(lowered).__name__}"
        )
    return Explanation(lowered.target, tuple(lowered.passes), lowered.report)


def encode_records(records: Sequence[PassRecord]) -> list[Any]:
    """Records as plain types, for a manifest."""
    return [record.to_list() for record in records]


def decode_records(data: Any) -> list[PassRecord]:
    """The inverse of `encode_records`, from a file that nobody vouches for.

    Raises:
        ValueError: damaged, or with text that is no name: it will be printed.
    """
    if not isinstance(data, list):
        raise ValueError("the record of passes is no list")
    return [_decode(entry) for entry in data]


def _decode(entry: Any) -> PassRecord:
    name, changed, operators, modules = entry
    counts_are_valid = all(
        isinstance(table, dict)
        and all(pattern.fullmatch(k) and type(v) is int for k, v in table.items())
        for table, pattern in ((operators, _OPERATOR), (modules, _PATH))
    )
    if type(name) is not str or not _NAME.fullmatch(name) or type(changed) is not int:
        raise ValueError("a record of a pass without its name or count")
    if not counts_are_valid:
        raise ValueError(f"the record of pass {name} holds something else than counts of names")
    return PassRecord(name, changed, operators, modules)
