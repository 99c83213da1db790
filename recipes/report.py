"""The demo report: one self-contained HTML page and the same facts as JSON.

The page opens offline: images are data URIs, plots are inline SVG, and there is no script.
"""

import base64
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qmir_ao.recipes.images import Pixels, atomic_write
from qmir_ao.recipes.metrics import luma

Document = Mapping[str, Any]

TEMPLATE = "report.html.j2"
ERROR_PEAK = 64.0
"""Absolute error in grey levels that the error maps show as the brightest colour."""
OVERVIEW_SIDE = 420
SQNR_NOTE = (
    "Signal to quantization noise ratio at the output of each integer operator, on one held-out "
    "image: against the same operator in float on the values it gets before they are rounded. "
    "Higher is better; 6 dB are about one bit."
)


@dataclass(frozen=True)
class Picture:
    """One held-out image: the truth, what each method made of it, and the crop that is shown.

    Attributes:
        name: key of the image in the report document.
        truth: uint8 (H, W, 3).
        restored: method key to uint8 (H, W, 3).
        crop: top, left, height, width in pixels of `truth`.
    """

    name: str
    truth: Pixels
    restored: Mapping[str, Pixels]
    crop: tuple[int, int, int, int]


def data_uri(pixels: Pixels) -> str:
    """Encode uint8 (H, W, 3) as a PNG data URI."""
    import cv2

    done, data = cv2.imencode(".png", pixels[:, :, ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 9])
    if not done:
        raise RuntimeError(f"report: a crop of shape {pixels.shape} could not be encoded as PNG")
    return "data:image/png;base64," + base64.b64encode(data.tobytes()).decode("ascii")


def error_map(restored: Pixels, truth: Pixels) -> Pixels:
    """Absolute luma error in colours: black is none, white is `ERROR_PEAK` grey levels or more."""
    import matplotlib as mpl

    difference = np.abs(luma(restored) - luma(truth))
    colours = mpl.colormaps["inferno"](np.clip(difference / ERROR_PEAK, 0.0, 1.0))
    return np.ascontiguousarray((colours[:, :, :3] * 255.0).round().astype(np.uint8))


def _cut(pixels: Pixels, crop: tuple[int, int, int, int]) -> Pixels:
    top, left, height, width = crop
    return np.ascontiguousarray(pixels[top : top + height, left : left + width])


def _overview(picture: Picture) -> dict[str, Any]:
    """Thumbnail of the whole image, with the place of the crop in percent."""
    import cv2

    height, width = picture.truth.shape[:2]
    factor = min(1.0, OVERVIEW_SIDE / max(height, width))
    size = (round(width * factor), round(height * factor))
    top, left, rows, columns = picture.crop
    return {
        "uri": data_uri(cv2.resize(picture.truth, size, interpolation=cv2.INTER_AREA)),
        "width": size[0],
        "height": size[1],
        "box": {
            "top": 100 * top / height,
            "left": 100 * left / width,
            "height": 100 * rows / height,
            "width": 100 * columns / width,
        },
    }


def _panels(picture: Picture, document: Document) -> list[dict[str, Any]]:
    """Crops and error maps in the order of the methods, the truth last."""
    scores = {image["name"]: image for image in document["images"]}[picture.name]
    truth = _cut(picture.truth, picture.crop)
    panels = []
    for method in document["methods"]:
        crop = _cut(picture.restored[method["key"]], picture.crop)
        panels.append(
            {
                "label": method["label"],
                "uri": data_uri(crop),
                "error_uri": data_uri(error_map(crop, truth)),
                "psnr": scores["psnr"][method["key"]],
                "ssim": scores["ssim"][method["key"]],
            }
        )
    return [*panels, {"label": "Ground truth", "uri": data_uri(truth)}]


def _grouped(records: list[dict[str, str]]) -> list[dict[str, Any]]:
    """Operators left in float, one row for each kind and reason, most frequent first."""
    counts = Counter((record["op"], record["reason"]) for record in records)
    return [
        {"op": op, "reason": reason, "count": count} for (op, reason), count in counts.most_common()
    ]


def _kilobytes(count: float) -> str:
    return f"{count / 1000:,.1f} kB"


def _signed(decibels: float) -> str:
    return f"{decibels:+.2f}".replace("-", "\N{MINUS SIGN}")


def render(document: Document, pictures: list[Picture]) -> str:
    """Render the page.

    Args:
        document: what `report.json` holds; see `qmir_ao.recipes.demo`.
        pictures: the held-out images, named as in `document["images"]`.

    Returns:
        The HTML text.
    """
    import jinja2

    from qmir_ao.recipes.plots import loss_plot, sqnr_plot

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("qmir_ao.recipes"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"kilobytes": _kilobytes, "signed": _signed, "grouped": _grouped}
    quantized = [method for method in document["methods"] if method["weight_bits"] < 32]
    return environment.get_template(TEMPLATE).render(
        report=document,
        quantized=quantized,
        floating=next(m for m in document["methods"] if m["key"] == "float"),
        bicubic=next(m for m in document["methods"] if m["key"] == "bicubic"),
        images=[
            {
                "name": picture.name,
                "overview": _overview(picture),
                "panels": _panels(picture, document),
                "crop": picture.crop,
            }
            for picture in pictures
        ],
        error_peak=int(ERROR_PEAK),
        sqnr_note=SQNR_NOTE,
        sqnr_svg=sqnr_plot({m["label"]: m["operators"] for m in quantized}),
        loss_svg=loss_plot({m["label"]: m["loss"] for m in quantized}),
    )


def write(document: Document, pictures: list[Picture], folder: Path) -> tuple[Path, Path]:
    """Write `report.html` and `report.json` into `folder`, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    page, facts = folder / "report.html", folder / "report.json"
    # Both texts exist before the first file does.
    contents = {
        facts: json.dumps(document, indent=2, allow_nan=False) + "\n",
        page: render(document, pictures),
    }
    for path, text in contents.items():
        atomic_write(path, text.encode())
    return page, facts
