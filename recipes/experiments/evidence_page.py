"""The evidence as a page: Markdown tables and plots from the run records."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qmir_ao.recipes.experiments.ablations import ablation_table
from qmir_ao.recipes.experiments.comparison_plan import missing_runs
from qmir_ao.recipes.experiments.evidence import (
    DEFAULT,
    Cell,
    best_rates,
    counted,
    format_cell,
    of_length,
    rows,
    table,
)
from qmir_ao.recipes.experiments.evidence import WIDTHS as SEARCHED_WIDTHS
from qmir_ao.recipes.experiments.methods import METHODS
from qmir_ao.recipes.experiments.quantizer_tables import quantizer_lines
from qmir_ao.recipes.experiments.rfa_study import rfa_lines
from qmir_ao.recipes.experiments.runs import Run
from qmir_ao.recipes.experiments.tables import table as markdown_table
from qmir_ao.recipes.images import atomic_write

OURS, RIVAL = "#b8551b", "#5b7b94"
WIDTHS = (*SEARCHED_WIDTHS, 8)

Records = Sequence[dict[str, Any]]


def _main_table(
    records: Records, entries: Records, width: int, float_psnr: Mapping[str, float]
) -> list[str]:
    scores, simulated = table(entries, width), table(entries, width, "psnr")
    ssim = table(entries, width, "ssim_integer")
    if not scores:
        return []
    sets = list(next(iter(scores.values())))
    rates = best_rates(records, width)
    head = ["method", "rate", "seeds"]
    head += [f"{name}, integer" for name in sets] + [f"{name}, simulated" for name in sets]
    head += [f"{name}, SSIM" for name in sets] + ["bytes of weights and scales", "s/step"]
    full = [f"{float_psnr[name]:.3f}" if name in float_psnr else "" for name in sets]
    blank = [""] * (2 * len(sets) + 2)
    shown = [["float32", "", "", *full, *blank]]
    for key, cells in scores.items():
        sample = next(e for e in entries if e["method"] == key and e["weight_bits"] == width)
        label = METHODS[key].label
        values = [format_cell(scored[n]) for scored in (cells, simulated[key]) for n in sets]
        values += [f"{ssim[key][n].mean:.4f}" for n in sets]
        count = len(next(iter(cells.values())).values)
        values += [f"{sample['weight_bytes']:,} + {sample['scale_bytes']:,}"]
        values += [f"{sample['seconds_per_step']:.2f}"]
        name = f"**{label}**" if key == DEFAULT else label
        shown.append([name, f"{rates[key]:g}", f"{count}", *values])
    title = f"## {width}-bit weights and activations"
    verdict = [*_verdict(scores, sets, float_psnr), *_duration(entries, width)]
    return [title, "", *markdown_table(head, shown), "", *verdict, ""]


def _duration(entries: Records, width: int) -> list[str]:
    """How long the default trains for these numbers."""
    return [
        f"- Training DLS + RFA takes {e['iterations'] * e['seconds_per_step'] / 60:.1f} minutes."
        for e in entries
        if e["method"] == DEFAULT and e["weight_bits"] == width
    ][:1]


def _verdict(
    scores: Mapping[str, Mapping[str, Cell]], sets: Sequence[str], float_psnr: Mapping[str, float]
) -> list[str]:
    """What the table says about the default, in words that follow from its numbers."""
    ours = scores.get(DEFAULT)
    if ours is None:
        return []
    lines = [
        f"- {name}: DLS + RFA is {float_psnr[name] - ours[name].mean:.3f} dB below float32."
        for name in sets
        if name in float_psnr
    ]
    rivals = [key for key in scores if not METHODS[key].ours]
    halves = [key for key in scores if METHODS[key].ours and key != DEFAULT]
    for name in sets:
        if rivals:
            best = max(rivals, key=lambda key: scores[key][name].mean)
            lines.append(
                _lead(ours[name], scores[best][name], name, f"the best rival, {_of(best)}")
            )
        lines += [
            _lead(ours[name], scores[key][name], name, f"{_of(key)}, a half of it")
            for key in halves
            if scores[key][name].mean > ours[name].mean
        ]
    return lines


def _of(key: str) -> str:
    return METHODS[key].label


def _lead(ours: Cell, other: Cell, name: str, called: str) -> str:
    lead, spread = ours.mean - other.mean, max(ours.deviation, other.deviation)
    if min(len(ours.values), len(other.values)) > 1:
        side = "beyond" if abs(lead) > spread else "within"
        certainty = f"{side} the seeds' spread ({spread:.3f} dB)"
    else:
        certainty = "one of them on one seed, so the spread is not known"
    word = "ahead of" if lead > 0 else "behind"
    return f"- {name}: DLS + RFA is {abs(lead):.3f} dB {word} {called}, {certainty}."


def _ablations(records: Records, width: int) -> list[str]:
    lines: list[str] = []
    for title, variants in ablation_table(records, width).items():
        if len(variants) < 2:
            continue
        sets = list(variants[0].cells)
        shown = [
            [
                v.label,
                f"{len(v.cells[sets[0]].values)}",
                *(format_cell(v.cells[name]) for name in sets),
                "" if v.gain is None else format_cell(v.gain, sign=True),
            ]
            for v in variants
        ]
        lines += [f"### {title}, {width} bits", ""]
        lines += [*markdown_table(["variant", "seeds", *sets, "gain, same seeds"], shown), ""]
    return lines


def _lengths(records: Records) -> list[str]:
    """What training longer changes, for the methods that did."""
    lengths, width = sorted({r["iterations"] for r in records}), SEARCHED_WIDTHS[0]
    scores = {n: table(rows(of_length(records, n)), width) for n in lengths}
    longest = scores[lengths[-1]]
    if len(lengths) < 2 or not longest:
        return []
    sets = list(next(iter(longest.values())))
    head = ["method", *(f"{name}, {n} iterations" for name in sets for n in lengths)]
    shown = [
        [
            METHODS[key].label,
            *(
                format_cell(scores[n][key][name], seeds=True) if key in scores[n] else ""
                for name in sets
                for n in lengths
            ),
        ]
        for key in longest
    ]
    title = f"## Longer training, {width} bits"
    return [
        title,
        "",
        *markdown_table(head, shown),
        "",
        "The number of seeds is in parentheses.",
        "",
    ]


def _plot(entries: Records, width: int, float_psnr: Mapping[str, float], path: Path) -> bool:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    scores = table(entries, width)
    if not scores:
        return False
    sets = list(next(iter(scores.values())))
    figure = Figure(figsize=(4.6 * len(sets), 0.34 * len(scores) + 1.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels: Any = figure.subplots(1, len(sets), sharey=True, squeeze=False)
    for axis, name in zip(panels[0], sets, strict=True):
        for place, (key, cells) in enumerate(reversed(scores.items())):
            colour = OURS if METHODS[key].ours else RIVAL
            cell = cells[name]
            axis.errorbar(
                cell.mean, place, xerr=cell.deviation, fmt="o", color=colour, capsize=3, ms=6
            )
        axis.set_yticks(range(len(scores)), [METHODS[k].label for k in reversed(scores)])
        title = f"{name}, W{width}A{width}"
        if name in float_psnr:
            title += f" (float32: {float_psnr[name]:.2f} dB)"
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("PSNR on Y of the integer network, dB")
        axis.locator_params(axis="x", nbins=5)
        axis.grid(axis="x", color="#dddddd")
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    figure.savefig(path, dpi=120, metadata={"Software": None})
    return True


def write_page(
    records: Records,
    entries: Records,
    folder: Path,
    *,
    iterations: int,
    float_psnr: Mapping[str, float],
) -> Path:
    """Write `README.md` and its plots.

    Args:
        records: from `evidence.read_records`, of any length.
        entries: rows of those of length `iterations`, from `evidence.rows`.
        folder: where the page goes; it must exist.
        iterations: length of the runs that the main tables are of.
        float_psnr: PSNR of the float network by set.

    Returns:
        The page's path.
    """
    everything, records = records, of_length(records, iterations)
    tried = [r for r in everything if r["iterations"] == iterations]
    lines = [*_introduction(iterations), *_missing(everything, tried, iterations)]
    for width in WIDTHS:
        part = _main_table(records, entries, width, float_psnr)
        if part and _plot(entries, width, float_psnr, folder / f"qat-x2-w{width}a{width}.png"):
            lines += part
            lines += [f"![PSNR of every method](qat-x2-w{width}a{width}.png)", ""]
            lines += quantizer_lines(records, entries, width)
    lines += _lengths(everything)
    lines += rfa_lines(
        [r for r in everything if "diverged" not in r], SEARCHED_WIDTHS[0], iterations
    )
    ablations = [line for width in WIDTHS for line in _ablations(records, width)]
    if ablations:
        lines += ["## Ablations of DLS + RFA", "", *ablations]
    page = folder / "README.md"
    atomic_write(page, "\n".join(lines).encode())
    return page


def _introduction(iterations: int) -> list[str]:
    return [
        "# Evidence: quantization methods on x2 super-resolution",
        "",
        "Generated by `qmir reproduce qat-x2` from the run records in `runs/`; do not edit. "
        "Network: `mambair-tiny-x2` with its shipped float weights. Every method trains on the "
        f"same patches in the same order, {iterations} iterations of batch 4, with one weight step "
        "for each output channel, a searched start, and the best of three learning rates on the "
        "first seed (on all seeds, where a second rate has them); *plain* rows start as their "
        "papers do. PSNR is on Y with a border of 2 pixels, mean and standard deviation over "
        "seeds; *integer* is the network lowered to integer kernels, *simulated* the "
        "fake-quantized one it was trained as. Seconds of a step (*s/step*) are measured alone for "
        "the methods in `runs/steps.json`; the others are those of runs beside other work.",
        "",
    ]


def _missing(everything: Records, tried: Records, iterations: int) -> list[str]:
    """What the plan has and the records lack, so that a reader knows how much the page says.

    Args:
        everything: all records.
        tried: those of the main length, with those that diverged.
        iterations: the main length.
    """
    left, planned = missing_runs(everything, iterations)
    lines = []
    if left:
        count = sum(len(runs) for runs in left.values())
        lines = [f"**Unfinished.** {count} of the {planned} runs of the plan are missing:", ""]
        lines += [f"- {label}: {_told(runs)}." for label, runs in left.items()]
        lines.append("")
    diverged = [r for r in tried if "diverged" in r]
    if diverged:
        names = "; ".join(
            f"{METHODS[r['method']].label}, W{r['weight_bits']}A{r['act_bits']}, rate "
            f"{r['learning_rate']:g}, seed {r['seed']}"
            for r in diverged
        )
        lines += [f"Diverged, so without scores: {names}.", ""]
    return lines


def _told(runs: Sequence[Run]) -> str:
    """Methods, and what is changed about them, with their number of runs."""
    names = Counter(
        " ".join([METHODS[run.method].label, *(f"{k}={v}" for k, v in run.settings.items())])
        for run in runs
    )
    return "; ".join(f"{name} ({counted(count, 'run')})" for name, count in names.items())
