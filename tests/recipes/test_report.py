"""The report page: one file, nothing to load, every picture in it."""

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from qmir_ao.recipes import plots, report

KEYS = ("bicubic", "float", "w4a4", "w2a2")
CROP = (4, 6, 24, 32)


def _method(key: str, bits: int) -> dict[str, Any]:
    method: dict[str, Any] = {
        "key": key,
        "label": key.upper(),
        "weight_bits": bits,
        "act_bits": bits,
        "psnr": 30.25,
        "ssim": 0.9,
    }
    if key != "bicubic":
        method |= {"weight_bytes": 12_500, "file_bytes": 90_000, "latency_ms": 12.0}
    if bits < 32:
        method |= {
            "weight_float_bytes": 100_000,
            "compression": 8.0,
            "integer_operators": 3,
            "iterations": 5,
            "fake_quantized_psnr": 30.2,
            "graph_bytes": 5_000,
            "left_in_float": [
                {"name": "x", "op": "<conv>", "module": "first", "reason": "first & last"}
            ],
            "operators": [
                {"name": f"o{i}", "kind": kind, "sqnr_db": 10.0 + i}
                for i, kind in enumerate(plots.MARKERS)
            ],
            "loss": [0.1, 0.05, 0.04, 0.03, 0.03],
        }
    return method


@pytest.fixture
def pictures() -> list[report.Picture]:
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)
    restored = {key: rng.integers(0, 256, truth.shape, dtype=np.uint8) for key in KEYS}
    return [report.Picture("cat", truth, restored, CROP)]


@pytest.fixture
def document() -> dict[str, Any]:
    scores = dict.fromkeys(KEYS, 30.25)
    return {
        "qmir_ao": "0.1.0",
        "torch": "2.13.0",
        "created": "2026-01-01 00:00 UTC",
        "model": {"name": "tiny", "parameters": 100_000, "scale": 2},
        "methods": [_method(key, bits) for key, bits in zip(KEYS, (32, 32, 4, 2), strict=True)],
        "images": [
            {"name": "cat", "size": [40, 48], "crop": list(CROP), "psnr": scores, "ssim": scores}
        ],
        "probe": {"side": 128, "latency_repeats": 5},
        "settings": {
            "seed": 0,
            "batch": 4,
            "patch": 32,
            "learning_rate": 8e-4,
            "train_images": ["dog"],
        },
        "machine": {
            "cpu": "a <fast> one",
            "threads": 2,
            "system": "Linux",
            "python": "3.11",
            "kernels": "C++",
        },
        "seconds": {"prepare": 1.0, "total": 2.0},
    }


class _Page(HTMLParser):
    """Collects tags with their attributes, and checks that they nest."""

    VOID = ("meta", "img", "br", "link", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_loads_nothing(document: dict[str, Any], pictures: list[report.Picture]) -> None:
    text = report.render(document, pictures)
    page = _Page(text)
    assert page.open == []
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "embed"}
    targets = [a[k] for _, a in page.tags for k in ("src", "href", "srcset") if k in a]
    assert targets
    assert all(t is not None and t.startswith(("data:image/png;base64,", "#")) for t in targets)
    assert "http://" not in text
    assert "https://" not in text
    assert not re.search(r"@import|url\((?!#)", text)


def test_every_picture_is_embedded(
    document: dict[str, Any], pictures: list[report.Picture]
) -> None:
    page = _Page(report.render(document, pictures))
    sources = [a["src"] or "" for tag, a in page.tags if tag == "img"]
    # The overview, four methods with an error map each, and the truth.
    assert len(sources) == 1 + 2 * len(KEYS) + 1
    decoded = [
        cv2.imdecode(np.frombuffer(base64.b64decode(s.split(",", 1)[1]), np.uint8), 1)
        for s in sources
    ]
    assert all(image is not None for image in decoded)
    top, left, height, width = CROP
    want = pictures[0].restored["bicubic"][top : top + height, left : left + width, ::-1]
    assert np.array_equal(decoded[1], want)
    assert all(a.get("alt") for tag, a in page.tags if tag == "img")


def test_text_is_escaped(document: dict[str, Any], pictures: list[report.Picture]) -> None:
    text = report.render(document, pictures)
    assert "a &lt;fast&gt; one" in text
    assert "&lt;conv&gt;" in text
    assert "first &amp; last" in text


def test_ids_of_two_plots_do_not_clash(
    document: dict[str, Any], pictures: list[report.Picture]
) -> None:
    text = report.render(document, pictures)
    ids = re.findall(r'\sid="([^"]+)"', text)
    assert set(re.findall(r'href="#([^"]+)"', text)) <= set(ids)
    for name in set(ids):
        # Matplotlib names a marker by its content: equal names are equal shapes.
        shapes = re.findall(rf'id="{name}"[^>]*?\sd="([^"]*)"', text)
        assert len(set(shapes)) <= 1


def test_write_leaves_both_files_or_none(
    tmp_path: Path, document: dict[str, Any], pictures: list[report.Picture]
) -> None:
    page, facts = report.write(document, pictures, tmp_path / "out")
    assert page.read_text().startswith("<!doctype html>")
    assert json.loads(facts.read_text()) == document
    broken = {**document, "images": []}
    with pytest.raises(KeyError, match="cat"):
        report.write(broken, pictures, tmp_path / "broken")
    assert list((tmp_path / "broken").iterdir()) == []


def test_numbers_that_json_lacks_are_refused(
    tmp_path: Path, document: dict[str, Any], pictures: list[report.Picture]
) -> None:
    document["methods"][2]["psnr"] = float("nan")
    with pytest.raises(ValueError, match="JSON"):
        report.write(document, pictures, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_error_map_is_black_where_nothing_differs() -> None:
    truth = np.full((8, 9, 3), 100, np.uint8)
    other = truth.copy()
    other[3, 4] = 255
    colours = report.error_map(other, truth)
    assert colours.shape == truth.shape
    assert colours[0, 0].max() < 8
    assert colours[3, 4].sum() > 400


def test_plots_take_their_colours_from_the_page() -> None:
    records = [{"name": "a", "kind": "linear", "sqnr_db": 20.0}] * 3
    svg = plots.sqnr_plot({"W4A4": records, "W2A2": records})
    for variable in ("--ink", "--muted", "--line", "--series-1", "--series-2"):
        assert f"var({variable})" in svg
    assert not [colour for colour in plots.CSS_COLOURS if colour in svg]
    assert svg.startswith("<svg ")
    assert svg.endswith("</svg>")


def test_plots_are_reproducible() -> None:
    losses = {"W4A4": [0.3, 0.2, 0.1], "W2A2": [0.5, 0.3, 0.2]}
    assert plots.loss_plot(losses) == plots.loss_plot(losses)
