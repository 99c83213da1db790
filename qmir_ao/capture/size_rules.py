"""Conditions on input sizes that a forward decided on while it was exported.

torch.export follows control flow on shapes with the sizes of the example: a graph made with an even
height may leave out what an odd one needs. Such a decision becomes a rule that the graph checks. A
rule is nested lists, so that a file can hold it: `["eq", ["mod", ["size", 0, 2], 2], 0]` says that
dimension 2 of input 0 is even.
"""

import operator
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qmir_ao.errors import ConfigError

_TORCH = str(Path(torch.__file__).parent)
_PYTHON_CODE = str(Path(torch.__file__).parent / "nn")


def _fold(function: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    def folded(first: Any, *rest: Any) -> Any:
        for value in rest:
            first = function(first, value)
        return first

    return folded


_FUNCTIONS: dict[str, tuple[Callable[..., Any], str]] = {
    "eq": (operator.eq, "=="),
    "ne": (operator.ne, "!="),
    "lt": (operator.lt, "<"),
    "le": (operator.le, "<="),
    "gt": (operator.gt, ">"),
    "ge": (operator.ge, ">="),
    "mod": (operator.mod, "%"),
    "floordiv": (operator.floordiv, "//"),
    "add": (_fold(operator.add), "+"),
    "mul": (_fold(operator.mul), "*"),
    "and": (lambda *values: all(values), "and"),
    "or": (lambda *values: any(values), "or"),
    "max": (max, "max"),
    "min": (min, "min"),
    "not": (operator.not_, "not"),
}
_SYMPY = {
    "Equality": "eq",
    "Unequality": "ne",
    "StrictLessThan": "lt",
    "LessThan": "le",
    "StrictGreaterThan": "gt",
    "GreaterThan": "ge",
    "Mod": "mod",
    "PythonMod": "mod",
    "FloorDiv": "floordiv",
    "Add": "add",
    "Mul": "mul",
    "And": "and",
    "Or": "or",
    "Max": "max",
    "Min": "min",
    "Not": "not",
}


def check_sizes(tensors: Sequence[Tensor], names: Sequence[str], rules: Sequence[Any]) -> Tensor:
    """Return the first tensor if the sizes of all obey every rule.

    Args:
        tensors: inputs of a captured graph.
        names: their names, for the message.
        rules: see the module.

    Raises:
        ConfigError: a rule does not hold, or is none.
    """
    for rule in rules:
        if not _value(rule, tensors):
            shapes = ", ".join(
                f"{n!r} of shape {tuple(t.shape)}" for n, t in zip(names, tensors, strict=True)
            )
            raise ConfigError(
                f"got {shapes}, but the model was captured where {_text(rule, names)}: its forward "
                "decides on that. Capture it again with example_inputs that decide as this input "
                "does, or replace the decision by arithmetic on sizes"
            )
    return tensors[0]


def _value(rule: Any, tensors: Sequence[Tensor]) -> Any:
    if isinstance(rule, int):
        return rule
    name, *parts = rule
    if name == "size":
        return tensors[parts[0]].shape[parts[1]]
    if name not in _FUNCTIONS:
        raise ConfigError(f"a rule on sizes names {name!r}; allowed: {', '.join(_FUNCTIONS)}, size")
    return _FUNCTIONS[name][0](*(_value(part, tensors) for part in parts))


def _text(rule: Any, names: Sequence[str]) -> str:
    if isinstance(rule, int):
        return str(rule)
    name, *parts = rule
    if name == "size":
        return f"{names[parts[0]]}.shape[{parts[1]}]"
    texts = [_text(part, names) for part in parts]
    symbol = _FUNCTIONS[name][1]
    if name in ("max", "min", "not"):
        return f"{symbol}({', '.join(texts)})"
    return f" {symbol} ".join(f"({t})" if " " in t else t for t in texts)


def names_dimension(rule: Any, dim: int) -> bool:
    """Whether a rule is about dimension `dim` of any input."""
    if isinstance(rule, int):
        return False
    name, *parts = rule
    return parts[1] == dim if name == "size" else any(names_dimension(p, dim) for p in parts)


def insert_size_checks(graph_module: GraphModule, inputs: Sequence[Node]) -> None:
    """Add `check_sizes` behind the inputs of an exported graph, where there are rules.

    Args:
        graph_module: the graph.
        inputs: nodes that stand for its tensor inputs, with their fake values.
    """
    rules = _rules([node.meta["val"] for node in inputs])
    if not rules:
        return
    graph, last = graph_module.graph, inputs[-1]
    names = [str(node.all_input_nodes[0].target) for node in inputs]
    with graph.inserting_after(last):
        checked = graph.call_function(check_sizes, (list(inputs), names, rules))
    checked.meta = dict(inputs[0].meta)
    inputs[0].replace_all_uses_with(checked, delete_user_cb=lambda n: n is not checked)
    # What was computed from the first input before the last one was known comes first no more.
    graph_module.recompile()


def _rules(values: Sequence[Tensor]) -> list[Any]:
    places: dict[Any, list[Any]] = {}
    rules: list[Any] = []
    environment = None
    for i, value in enumerate(values):
        for dim, size in enumerate(value.shape):
            if not isinstance(size, torch.SymInt):
                continue
            environment = size.node.shape_env
            _place(size.node.expr, ["size", i, dim], places, rules)
    if environment is None:
        return []
    for guard in environment.guards:
        if _decided_in_python(guard):
            rules += _translated(environment.replace(guard.expr), places, environment)
    return [rule for at, rule in enumerate(rules) if rule not in rules[:at]]


def _place(size: Any, place: list[Any], places: dict[Any, list[Any]], rules: list[Any]) -> None:
    """Note which dimension a symbol stands for; a second one has to be equal."""
    factor, symbol = size.as_coeff_Mul()
    if not symbol.is_Symbol:
        return
    factor = int(factor)
    if factor != 1:
        rules.append(["eq", ["mod", place, factor], 0])
    value = place if factor == 1 else ["floordiv", place, factor]
    if symbol in places:
        rules.append(["eq", value, places[symbol]])
    else:
        places[symbol] = value


def _decided_in_python(guard: Any) -> bool:
    """Whether a guard comes from code that calls operators, not from an operator's own shapes."""
    place = guard.sloc.framework_loc
    filename = str(getattr(place, "filename", place))
    return not filename.startswith(_TORCH) or filename.startswith(_PYTHON_CODE)


def _translated(expr: Any, places: dict[Any, list[Any]], environment: Any) -> list[Any]:
    """A guard as a rule; where it has no form, its sizes have to be those of the example."""
    if type(expr).__name__ == "BooleanTrue":
        return []
    rule = _rule(expr, places)
    if rule is not None:
        return [rule]
    known = [s for s in expr.free_symbols if s in places]
    hints = environment.backed_var_to_val
    return [["eq", places[s], int(hints[s])] for s in known if s in hints]


def _rule(expr: Any, places: dict[Any, list[Any]]) -> Any:
    if expr.is_Integer:
        return int(expr)
    if expr.is_Symbol:
        return places.get(expr)
    name = _SYMPY.get(type(expr).__name__)
    parts = [_rule(part, places) for part in expr.args]
    if name is None or any(part is None for part in parts):
        return None
    return [name, *parts]
