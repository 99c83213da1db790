"""Model zoo: `create_model(name)` and `list_models()`."""

from qmir_ao.recipes.models.registry import create_model, list_models

__all__ = ["create_model", "list_models"]
