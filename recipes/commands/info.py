"""`qmir info`: what a model is."""

from typing import TYPE_CHECKING, Any

from qmir_ao.recipes.commands import options
from qmir_ao.recipes.console import emit_facts, emit_json, emit_table, status

if TYPE_CHECKING:
    from torch import nn


def info(model: options.Model, arch: options.Arch = None, as_json: options.AsJson = False) -> None:
    """Show what a model is: parameters, bytes, integer and float operators."""
    with status("loading the model"):
        from qmir_ao.recipes.loading import load_model
        from qmir_ao.recipes.models import create_model, list_models

        # A zoo name needs no weights to be described.
        if model in list_models():
            document = {"model": model, "source": "zoo", **_float_facts(create_model(model))}
        else:
            loaded = load_model(model, arch)
            facts = _lowered_facts if loaded.source == "lowered" else _float_facts
            document = {"model": loaded.name, "source": loaded.source, **facts(loaded.model)}
    if as_json:
        emit_json(document)
        return
    operators, left = document.pop("operators", []), document.pop("left_in_float", [])
    emit_facts({name.replace("_", " "): value for name, value in document.items()})
    if operators:
        columns = ["name", "kind", "weight_bits", "act_bits", "weight_bytes", "float_bytes"]
        emit_table("integer operators", columns, [[str(r[c]) for c in columns] for r in operators])
        columns = ["op", "module", "reason"]
        emit_table("left in float", columns, [[str(r[c]) for c in columns] for r in left])


def _float_facts(model: "nn.Module") -> dict[str, Any]:
    tensors = model.state_dict().values()
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "bytes": sum(t.numel() * t.element_size() for t in tensors),
        "scale": int(getattr(model, "scale", 1)),
        "architecture": type(model).__name__,
    }


def _lowered_facts(model: "nn.Module") -> dict[str, Any]:
    report: dict[str, Any] = model.report.to_dict()
    tensors = model.state_dict().values()
    operators = report["operators"]
    return {
        "bytes": sum(t.numel() * t.element_size() for t in tensors),
        "quantized_weight_bytes": sum(record["weight_bytes"] for record in operators),
        "their_float32_bytes": sum(record["float_bytes"] for record in operators),
        "integer_operators": len(operators),
        "float_operators": len(report["left_in_float"]),
        "operators": operators,
        "left_in_float": report["left_in_float"],
    }
