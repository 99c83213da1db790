"""`qmir info`: what a model is."""

from typing import TYPE_CHECKING, Any

from qmir_ao.recipes.commands import options
from qmir_ao.recipes.console import OUT, emit_facts, emit_json, emit_table, status

if TYPE_CHECKING:
    from torch import nn

    from qmir_ao.backend.lowered import LoweredModule

COLUMNS = ("source", "kind", "weight_bits", "act_bits", "weight_bytes", "float_bytes")


def info(model: options.Model, arch: options.Arch = None, as_json: options.AsJson = False) -> None:
    """Show what a model is: parameters, bytes, integer and float operators."""
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
    if isinstance(network, LoweredModule):
        _show_lowered(network, facts, as_json)
    elif as_json:
        emit_json(facts | _float_facts(network))
    else:
        emit_facts(facts | _float_facts(network))


def _bytes(model: "nn.Module") -> int:
    return sum(t.numel() * t.element_size() for t in model.state_dict().values())


def _float_facts(model: "nn.Module") -> dict[str, Any]:
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "bytes": _bytes(model),
        "scale": int(getattr(model, "scale", 1)),
        "architecture": type(model).__name__,
    }


def _show_lowered(model: "LoweredModule", facts: dict[str, Any], as_json: bool) -> None:
    report = model.report.to_dict()
    if as_json:
        emit_json({**facts, "bytes": _bytes(model), **report})
        return
    rows = [[str(record[column]) for column in COLUMNS] for record in report["operators"]]
    emit_facts({**facts, "bytes": _bytes(model)})
    emit_table("integer operators", [column.replace("_", " ") for column in COLUMNS], rows)
    OUT.print(str(model.report), markup=False)
