"""The page of the zoo lists every model with its true number of parameters."""

import re
from pathlib import Path

from support.zoo import parameter_count

from qmir_ao.recipes.models import list_models

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "models.md").read_text()


def listed() -> dict[str, int]:
    """Names and parameters of the table; `-x3` shortens the name before it."""
    found: dict[str, int] = {}
    for names, counts in re.findall(r"^\|[^|]*\| (`[^|]*`) \| ([0-9,/ ]+) \|$", PAGE, re.MULTILINE):
        first, *others = re.findall(r"`([^`]+)`", names)
        full = [first, *(re.sub(r"-x\d$", other, first) for other in others)]
        numbers = [int(count.replace(",", "")) for count in counts.split("/")]
        found |= dict(zip(full, numbers, strict=True))
    return found


def test_every_model_is_listed_with_its_parameters() -> None:
    assert sorted(listed()) == sorted(list_models())
    assert listed() == {name: parameter_count(name) for name in list_models()}
