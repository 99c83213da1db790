"""`qmir info`: what a model is, and what it costs."""

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qmir_ao.errors import ConfigError
from qmir_ao.recipes.commands import options
from qmir_ao.recipes.console import OUT, emit_facts, emit_json, emit_table, emit_text, status

if TYPE_CHECKING:
    from torch import nn

    from qmir_ao.backend.lowered import LoweredModule
    from qmir_ao.recipes.complexity import Complexity

COLUMNS = ("source", "kind", "weight_bits", "act_bits", "weight_bytes", "float_bytes")
BITS = (8, 4, 2)


def info(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="Name of the zoo, weights file (.safetensors, .pth) or folder of a lowered model.",
        ),
    ] = None,
    bits: Annotated[
        list[int] | None,
        typer.Option(help="Bytes at these bits, 2 to 8; repeatable.", show_default="8, 4, 2"),
    ] = None,
    side: Annotated[
        int, typer.Option(help="Height and width of the input that operations are counted on.")
    ] = 320,
    explain: Annotated[
        bool,
        typer.Option("--explain", help="Of a lowered model: what each pass changed, and why."),
    ] = False,
    table4: Annotated[
        bool, typer.Option("--table4", help="Count the networks behind the paper's table 4.")
    ] = False,
    arch: options.Arch = None,
    as_json: options.AsJson = False,
) -> None:
    """Show what a model is: parameters, operations, bytes, integer and float operators."""
    if table4 == (model is not None):
        raise ConfigError("info: give a MODEL or --table4, one of the two")
    if table4:
        _show_table4(side, as_json)
        return
    assert model is not None
    with status("loading the model"):
        from qmir_ao.backend.lowered import LoweredModule
        from qmir_ao.recipes.loading import load_model
        from qmir_ao.recipes.models import create_model, list_models

        # A zoo name needs no weights to be described.
        if model in list_models():
            network, facts = create_model(model), {"model": model, "source": "zoo"}
        else:
            loaded = load_model(model, arch)
            network, facts = loaded.model, {"model": loaded.name, "source": loaded.source}
    if explain:
        _show_explanation(network, facts, as_json)
    elif isinstance(network, LoweredModule):
        _show_lowered(network, facts, as_json)
    else:
        _show_float(network, facts, bits or list(BITS), side, as_json)


def _bytes(model: "nn.Module") -> int:
    return sum(t.numel() * t.element_size() for t in model.state_dict().values())


def _show_float(
    model: "nn.Module", facts: dict[str, Any], bits: list[int], side: int, as_json: bool
) -> None:
    with status("counting"):
        from qmir_ao.quant.spec import check_bits
        from qmir_ao.recipes.complexity import LABELS, bytes_at, complexity

        sizes = bytes_at(model, [check_bits(width) for width in bits])
        counts = complexity(model, side)
    facts = facts | {
        "parameters": counts.parameters,
        "bytes": _bytes(model),
        "scale": int(getattr(model, "scale", 1)),
        "architecture": type(model).__name__,
    }
    if as_json:
        emit_json(facts | {"complexity": dataclasses.asdict(counts), "labels": LABELS} | sizes)
        return
    emit_facts(facts)
    emit_table(
        "parameters, and operations on one image",
        ["count", "value", "what it includes"],
        [[_name(key, counts), f"{getattr(counts, key):,}", label] for key, label in LABELS.items()],
    )
    emit_table(
        "bytes, with what stays in float in float32",
        ["bits", "quantized weights and scales", "the rest", "together", "of float32"],
        [
            [key, *(f"{row[k]:,}" for k in ("weights", "rest", "total")), f"{row['ratio']:.3f}x"]
            for key, row in sizes["bytes_at"].items()
        ],
    )


def _name(key: str, counts: "Complexity") -> str:
    name = key.replace("_", " ").replace("macs", "MACs")
    return name if "parameters" in key else f"{name} at {counts.side}x{counts.side}"


def _show_table4(side: int, as_json: bool) -> None:
    with status("counting"):
        import torch

        from qmir_ao.recipes.complexity import LABELS, TABLE_4, complexity

        with torch.device("meta"):  # counting needs no values
            networks = [described.build() for described in TABLE_4]
        found = [(d, complexity(net, side)) for d, net in zip(TABLE_4, networks, strict=True)]
    if as_json:
        rows = [
            {"row": d.row, "published": list(d.published), **dataclasses.asdict(c)}
            for d, c in found
        ]
        emit_json({"rows": rows, "labels": LABELS})
        return
    emit_table(
        f"the networks behind the float rows of table 4, input {side}x{side}",
        ["network", "params, printed", "thop", "true", "flops, printed", "thop MACs", "true MACs"],
        [
            [
                d.row,
                d.published[0],
                f"{c.thop_parameters:,}",
                f"{c.parameters:,}",
                d.published[1],
                f"{c.thop_macs / 1e9:,.2f} G",
                f"{c.macs / 1e9:,.2f} G",
            ]
            for d, c in found
        ],
    )
    OUT.print(
        "The table prints the counts of thop, which sees no scan and no parameter of one, for "
        "networks other than the trained ones (qmir info mambair-light-x2, mambair-x2).",
        markup=False,
    )


def _show_explanation(model: "nn.Module", facts: dict[str, Any], as_json: bool) -> None:
    from qmir_ao.backend.explanation import explain_lowered
    from qmir_ao.backend.lowered import LoweredModule

    if not isinstance(model, LoweredModule):
        raise ConfigError(
            f"info --explain is for a lowered model (a folder that `qmir quantize` wrote), got "
            f"{facts['model']!r}, a float network"
        )
    explanation = explain_lowered(model)
    if as_json:
        emit_json(facts | explanation.to_dict())
        return
    emit_facts(facts)
    emit_text(str(explanation))


def _show_lowered(model: "LoweredModule", facts: dict[str, Any], as_json: bool) -> None:
    report = model.report.to_dict()
    if as_json:
        emit_json({**facts, "bytes": _bytes(model), **report})
        return
    rows = [[str(record[column]) for column in COLUMNS] for record in report["operators"]]
    emit_facts({**facts, "bytes": _bytes(model)})
    emit_table("integer operators", [column.replace("_", " ") for column in COLUMNS], rows)
    emit_text(str(model.report))
