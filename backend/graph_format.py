"""A lowered graph as plain types for JSON: small, readable, and unable to name foreign code.

    inputs   names of the placeholders
    targets  what is called: `aten.add.Tensor`, `qmir.conv2d.default`, `.view` (a method)
    calls    [target, arguments, keywords]: each distinct form of a call once, with holes for values
    nodes    [call, value, value, ...]: which values fill the holes of a call, in their order
    modules  [name, parent] of the modules that nodes came from, the parent by its place before it
    texts    names of nodes before lowering, and reasons
    notes    [node, name, module, source, act_bits, weight_bits, reason, parts] of the nodes that a
             report or a comparison asks about, without the nulls at the end; parts are the modules
             of the float operators that were fused into one

A value is an integer: first the inputs, then the tensors in the order of their names, then the
nodes in theirs. The last node is the output. Everything else of a graph follows from this: the
names of other nodes mean nothing, and the report is read off the graph.
"""

import itertools
import json
import keyword
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.immutable_collections import immutable_list

from qmir_ao.backend.targets import TargetNameError, decode_target, encode_target
from qmir_ao.errors import ConfigError
from qmir_ao.passes.chain import PARTS
from qmir_ao.passes.lower import REASON, SOURCE
from qmir_ao.quant.patterns import module_path

OUTPUT = "output"
_HOLE = "$"
_DTYPES = {
    str(d).removeprefix("torch."): d
    for d in (torch.float32, torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool)
}
_BITS = range(2, 9)


class _Table:
    """Distinct entries in order of first use."""

    def __init__(self) -> None:
        self.entries: list[Any] = []
        self._at: dict[str, int] = {}

    def index(self, entry: Any) -> int:
        at = self._at.setdefault(json.dumps(entry), len(self.entries))
        if at == len(self.entries):
            self.entries.append(entry)
        return at


def _encode(value: Any, holes: list[Node]) -> Any:
    if isinstance(value, Node):
        holes.append(value)
        return {_HOLE: len(holes) - 1}
    if isinstance(value, tuple):
        return {"$tuple": [_encode(v, holes) for v in value]}
    if isinstance(value, list | immutable_list):
        return [_encode(v, holes) for v in value]
    if isinstance(value, dict) and all(isinstance(k, str) for k in value):
        return {"$dict": [[k, _encode(v, holes)] for k, v in value.items()]}
    if isinstance(value, slice):
        return {"$slice": [_encode(v, holes) for v in (value.start, value.stop, value.step)]}
    if isinstance(value, torch.dtype) and str(value).removeprefix("torch.") in _DTYPES:
        return {"$dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"$device": "cpu"}
    if value is Ellipsis:
        return {"$ellipsis": True}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TargetNameError(f"argument of type {type(value).__name__}")


def _decode(value: Any, holes: Sequence[Node]) -> Any:
    if isinstance(value, list):
        return [_decode(v, holes) for v in value]
    if not isinstance(value, dict):
        return value
    ((tag, body),) = value.items()
    if tag == _HOLE:
        return _at(holes, body)
    if tag == "$tuple":
        return tuple(_decode(v, holes) for v in body)
    if tag == "$dict":
        return {_text(k): _decode(v, holes) for k, v in body}
    if tag == "$slice":
        return slice(*(_decode(v, holes) for v in body))
    if tag == "$dtype":
        return _DTYPES[body]
    if tag == "$device":
        return torch.device("cpu")
    if tag == "$ellipsis":
        return Ellipsis
    raise TargetNameError(f"tag {tag!r}")


def _at(entries: Sequence[Any], index: Any) -> Any:
    """An entry of a table by its index; counting from the end is not part of the format."""
    if type(index) is not int or not 0 <= index < len(entries):
        raise ValueError(f"no entry {index!r} in a table of {len(entries)}")
    return entries[index]


def _text(key: Any) -> str:
    if not isinstance(key, str):
        raise TargetNameError(f"key {key!r}")
    return key


def identifier(name: Any) -> str:
    """A name that FX prints into the code it generates: nothing but an identifier may pass."""
    if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name):
        raise TargetNameError(f"name {name!r}")
    return name


def encode_graph(graph: Graph, reported: set[str]) -> dict[str, Any]:
    """A graph as plain types.

    Args:
        graph: graph of operators, placeholders and tensors.
        reported: names of the nodes that the report lists.

    Raises:
        ConfigError: a node calls something that has no entry in the format.
    """
    nodes = list(graph.nodes)
    inputs = [n for n in nodes if n.op == "placeholder"]
    tensors = {name: len(inputs) + i for i, name in enumerate(tensor_names(graph))}
    value = {n: i for i, n in enumerate(inputs)}
    value |= {n: tensors[str(n.target)] for n in nodes if n.op == "get_attr"}
    called = [n for n in nodes if n not in value]
    value |= {n: len(inputs) + len(tensors) + i for i, n in enumerate(called)}
    targets, calls, modules, texts = _Table(), _Table(), _Table(), _Table()
    rows, notes = [], []
    for number, node in enumerate(called):
        try:
            holes: list[Node] = []
            name = ("." if node.op == "call_method" else "") + encode_target(node)
            call = [targets.index(name), [_encode(a, holes) for a in node.args]]
            if node.kwargs:
                call.append({k: _encode(v, holes) for k, v in node.kwargs.items()})
        except TargetNameError as error:
            raise _not_saved(node, error) from error
        rows.append([calls.index(call), *(value[n] for n in holes)])
        if note := _note(node, node.name in reported, modules, texts):
            notes.append([number, *note])
    return {
        "inputs": [_input(n) for n in inputs],
        "targets": targets.entries,
        "calls": calls.entries,
        "nodes": rows,
        "modules": modules.entries,
        "texts": texts.entries,
        "notes": notes,
    }


def tensor_names(graph: Graph) -> list[str]:
    """Names of the tensors a graph reads, in order."""
    return sorted({str(n.target) for n in graph.nodes if n.op == "get_attr"})


def _not_saved(node: Node, error: Exception) -> ConfigError:
    if isinstance(node.target, torch._ops.OpOverload):
        hint = "The format has no entry for this operator: run the lowered model as it is"
    else:
        hint = "Capture with example_inputs, so that it becomes an aten operator"
    return ConfigError(f"node {node.name} cannot be saved: {error}. {hint}")


def _input(node: Node) -> list[Any]:
    try:
        return [node.name, str(node.target), *(_encode(a, []) for a in node.args)]
    except TargetNameError as error:
        raise _not_saved(node, error) from error


def _module(path: str, modules: _Table) -> int | None:
    """Place of a module in the table, made after its parents."""
    if not path:
        return None
    parent, _, name = path.rpartition(".")
    above = _module(parent, modules)
    return modules.index([name] if above is None else [name, above])


def _paths(modules: Sequence[Any]) -> list[str]:
    """The inverse of `_module`: dotted paths."""
    paths: list[str] = []
    for name, *above in modules:
        if not isinstance(name, str):
            raise ValueError(f"a module named {name!r}")
        paths.append(f"{_at(paths, above[0])}.{name}" if above else name)
    return paths


def _note(node: Node, reported: bool, modules: _Table, texts: _Table) -> list[Any]:
    """What a report or a comparison reads: the name and parts of `node.meta`."""
    meta = node.meta
    source, reason = (texts.index(str(meta[k])) if k in meta else None for k in (SOURCE, REASON))
    note: list[Any] = [None, None, source]
    if reported:
        parts = meta.get(PARTS)
        only_float = parts and "act_bits" not in meta
        path = "" if only_float else str(meta.get("qmir_module") or module_path(node))
        note[:2] = node.name, _module(path, modules)
        note += [meta.get("act_bits"), meta.get("weight_bits"), reason]
        note.append([_module(part, modules) for part in parts] if parts else None)
    while note and note[-1] is None:
        note.pop()
    return note


def decode_graph(data: dict[str, Any], tensors: Sequence[str]) -> Graph:
    """The inverse of `encode_graph`; only allowed targets and plain names are resolved.

    Args:
        data: what `encode_graph` gave, as read from a file that nobody vouches for.
        tensors: names of the tensors, in order.

    Raises:
        TargetNameError: a target or name is not allowed.
        ValueError: the graph is damaged in another way.
    """
    graph = Graph()
    notes = {note[0]: note[1:] for note in data["notes"]}
    taken = {identifier(note[0]) for note in notes.values() if note[0] is not None}
    taken |= {identifier(entry[0]) for entry in data["inputs"]}
    names = _free_names(taken)
    paths = _paths(data["modules"])
    values: list[Node] = []
    for name, target, *default in data["inputs"]:
        args = tuple(_decode(a, []) for a in default[:1])
        values.append(graph.create_node("placeholder", identifier(target), args, name=name))
    for tensor in tensors:
        values.append(graph.create_node("get_attr", identifier(tensor), name=next(names)))
    for number, (index, *filling) in enumerate(data["nodes"]):
        note = (*notes.get(number, ()), *[None] * 7)
        target, args, kwargs = _call(_at(data["calls"], index), data["targets"], filling, values)
        node = graph.create_node(*target, args, kwargs, note[0] or next(names))
        node.meta.update(_meta(note, paths, data["texts"]))
        values.append(node)
    graph.lint()
    ops = [n.op for n in graph.nodes]
    if ops.count("output") != 1 or ops[-1] != "output":
        raise ValueError("a graph ends with its one output")
    return graph


def _free_names(taken: set[str]) -> Iterator[str]:
    return (name for name in (f"v{i}" for i in itertools.count()) if name not in taken)


def _call(
    call: Any, targets: Sequence[Any], filling: Sequence[int], values: Sequence[Node]
) -> tuple[tuple[str, Any], tuple[Any, ...], dict[str, Any]]:
    index, arguments, *keywords = call
    name = _at(targets, index)
    if not isinstance(name, str):
        raise TargetNameError(f"target {name!r}")
    op = "call_method" if name.startswith(".") else OUTPUT if name == OUTPUT else "call_function"
    holes = [_at(values, i) for i in filling]
    args = tuple(_decode(a, holes) for a in arguments)
    kwargs = {identifier(k): _decode(v, holes) for k, v in keywords[0].items()} if keywords else {}
    return (op, decode_target(op, name.removeprefix("."), args, kwargs)), args, kwargs


def _meta(note: Sequence[Any], paths: Sequence[str], texts: Sequence[Any]) -> dict[str, Any]:
    _, module, source, act_bits, weight_bits, reason, parts = note[:7]
    meta: dict[str, Any] = {} if module is None else {"qmir_module": _at(paths, module)}
    for key, index in ((SOURCE, source), (REASON, reason)):
        if index is not None:
            meta[key] = _at(texts, index)
            if not isinstance(meta[key], str):
                raise ValueError(f"text {index} is none")
    if act_bits is not None:
        for bits in (act_bits, weight_bits):
            if bits is not None and (type(bits) is not int or bits not in _BITS):
                raise ValueError(f"a bit width of {bits!r}")
        meta |= {"act_bits": act_bits, "weight_bits": weight_bits}
    if parts is not None:
        meta[PARTS] = tuple("" if part is None else _at(paths, part) for part in parts)
    return meta
