"""The library of compiled kernels: its name in the cache is that of what was compiled."""

import ctypes
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest

from qmir_ao.backend.cpu import build

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler here")
UNIT = '#include "answer.cuh"\nextern "C" int answer() { return ANSWER; }\n'


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One unit and one header to compile, and an empty cache."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "unit.cpp").write_text(UNIT)
    (source / "answer.cuh").write_text("#define ANSWER 1\n")
    monkeypatch.setenv("QMIR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(
        build, "sources", lambda: {f.name: f.read_bytes() for f in sorted(source.iterdir())}
    )
    return source


def answer(library: Path) -> int:
    return int(ctypes.CDLL(str(library)).answer())


def test_an_edit_while_compiling_is_not_stored_under_the_old_key(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_now = build._compile

    def edited(*args: Any) -> Path:
        (folder / "answer.cuh").write_text("#define ANSWER 2\n")
        return compile_now(*args)

    monkeypatch.setattr(build, "_compile", edited)
    first, second = build.build(), build.build()
    assert first != second
    assert (answer(first), answer(second)) == (1, 2)


def test_what_is_in_the_cache_is_not_compiled_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build.build()
    monkeypatch.setattr(build, "_compile", None)
    assert build.build() == first
    assert {path.name for path in first.parent.iterdir()} == {first.name, ".lock"}


def test_builds_that_start_together_compile_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_now, calls, both = build._compile, [], Barrier(2)

    def counted(*args: Any) -> Path:
        calls.append(args)
        return compile_now(*args)

    def start() -> Path:
        both.wait()
        return build.build()

    monkeypatch.setattr(build, "_compile", counted)
    with ThreadPoolExecutor(2) as pool:
        first, second = (job.result() for job in [pool.submit(start) for _ in range(2)])
    assert first == second and answer(first) == 1
    assert len(calls) == 1


def test_sources_hold_every_unit_and_header() -> None:
    root = Path(build.__file__).resolve().parent
    names = {path.name for path in (root / "csrc").iterdir()}
    assert names <= set(build.sources())
    included = {
        line.split(b'"')[1].decode()
        for content in build.sources().values()
        for line in content.splitlines()
        if line.startswith(b'#include "')
    }
    assert included <= set(build.sources())


def test_a_failed_compilation_says_why_and_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    (folder / "unit.cpp").write_text("int answer( {\n")
    with pytest.raises(build.BuildError, match=r"failed:(.|\n)*unit\.cpp"):
        build.build()
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [".lock"]
