"""`qmir recipes`: the recipes that come with this package."""

from typing import Annotated

import typer

from qmir_ao.recipes.commands import options
from qmir_ao.recipes.console import OUT, emit_json, emit_table, status


def recipes(
    name: Annotated[
        str | None, typer.Argument(help="Recipe or YAML file to check and print.")
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """List the recipes, or print one as YAML, to be copied and changed."""
    with status("loading torch"):
        from qmir_ao.recipes.schema import list_recipes, load_recipe, recipe_path

        chosen = list_recipes() if name is None else [name]
        loaded = [load_recipe(n) for n in chosen]
    if as_json:
        emit_json({recipe.name: recipe.to_dict() for recipe in loaded})
    elif name is not None:
        OUT.file.write(recipe_path(name).read_text(encoding="utf-8"))
    else:
        rows = []
        for recipe in loaded:
            quant = None if recipe.quant is None else recipe.quant.settings
            bits = f"W{quant['weight_bits']}A{quant['act_bits']}" if quant else "float"
            rows.append(
                [recipe.name, recipe.task.title, recipe.model.name, bits, recipe.train.iterations]
            )
        header = ["recipe", "task", "model", "bits", "iterations"]
        emit_table("", header, [[str(cell) for cell in row] for row in rows])
