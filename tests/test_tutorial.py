"""The tutorial is run from top to bottom, and prints what it says it prints.

After a change of numerics, `python tests/test_tutorial.py` writes the new output into the page; the
text around it is to be read again then.
"""

import contextlib
import io
import re
import shlex
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from rich.console import ConsoleDimensions

from qmir_ao.recipes import cli
from qmir_ao.recipes.console import OUT

PAGE = Path(__file__).resolve().parents[1] / "docs" / "tutorial.md"
FENCE = re.compile(r"```(python|bash|text)\n(.*?)```", flags=re.DOTALL)
NUMBER = re.compile(r"-?\d+\.\d+")
UNSTABLE = re.compile(r"^(minutes|loss) .*$", flags=re.MULTILINE)
OWN_NETWORK, FIRST_SECTION = 1, "## 2"
LINES = 30
SIZE = (100, 25)
"""Of the console; a width alone does not change that of a terminal called dumb."""


def steps(text: str) -> Iterator[tuple[str, str, str]]:
    """Language, code, and the output that is shown after it (empty for none)."""
    found = FENCE.findall(text)
    for (language, code), following in zip(found, [*found[1:], ("", "")], strict=True):
        if language != "text":
            yield language, code, following[1] if following[0] == "text" else ""


def run(language: str, code: str, scope: dict[str, object]) -> str:
    """Execute one block and return what it printed on stdout."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        if language == "python":
            exec(compile(code, str(PAGE), "exec"), scope)
        else:
            for line in code.replace("\\\n", " ").splitlines():
                program, *arguments = shlex.split(line, comments=True)
                assert program == "qmir"
                assert cli.main(arguments) == 0, line
    return out.getvalue()


def same(got: str, shown: str) -> bool:
    """Whether two outputs agree: words and whole numbers exactly, decimals within a tolerance.

    Another compiler or instruction set rounds differently, and training amplifies that: 2 percent
    of a number, but at least 0.005 and at most 0.1.
    """

    sides = [UNSTABLE.sub("", text) for text in (got, shown)]
    words, shown_words = (NUMBER.sub("#", side).split() for side in sides)
    decimals, shown_decimals = ([float(x) for x in NUMBER.findall(side)] for side in sides)
    return words == shown_words and all(
        abs(a - b) <= min(max(0.02 * abs(b), 0.005), 0.1) + 1e-9
        for a, b in zip(decimals, shown_decimals, strict=True)
    )


def refresh() -> None:
    """Run the page in a folder of its own and write what it prints into it."""
    text, scope = PAGE.read_text(), dict[str, object]()
    torch.set_num_threads(1)
    OUT.size = ConsoleDimensions(*SIZE)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for language, code, shown in steps(text):
            got = "".join(f"{line.rstrip()}\n" for line in run(language, code, scope).splitlines())
            block = f"```{language}\n{code}```\n\n```text\n"
            text = text.replace(block + shown, block + got) if shown else text
    PAGE.write_text(text)


@pytest.mark.slow
def test_the_tutorial_prints_what_it_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(OUT, "_width", SIZE[0])
    monkeypatch.setattr(OUT, "_height", SIZE[1])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        scope: dict[str, object] = {}
        for language, code, shown in steps(PAGE.read_text()):
            got = run(language, code, scope)
            assert not shown or same(got, shown), f"{code}\nprints\n{got}\nnot\n{shown}"
    finally:
        torch.set_num_threads(threads)


def test_own_network_takes_thirty_lines() -> None:
    section = PAGE.read_text().split(FIRST_SECTION)[0]
    blocks = [code for language, code, _ in steps(section) if language == "python"]
    code = [line for block in blocks[OWN_NETWORK:] for line in block.splitlines() if line.strip()]
    assert 10 < len(code) <= LINES


def test_every_block_with_output_shows_it() -> None:
    printing = [shown for language, code, shown in steps(PAGE.read_text()) if "print(" in code]
    assert len(printing) >= 5
    assert all(printing)


@pytest.mark.parametrize(
    ("got", "agrees"),
    [
        ("a 4 1.004 36.24\n", True),
        ("a 5 1.0 36.2\n", False),
        ("b 4 1.0 36.2\n", False),
        ("a 4 1.03 36.2\n", False),
        ("a 4 1.0 36.31\n", False),
        ("a 4 1.0\n", False),
    ],
)
def test_comparison_of_outputs(got: str, agrees: bool) -> None:
    assert same(got, "a  4   1.000   36.20") is agrees


if __name__ == "__main__":
    refresh()
