"""Find the scan functions of known packages among what is imported, and pair them with adapters.

Repositories copy these functions around, so that no module name identifies them: a candidate has
the published name and argument names. One that runs where the model is, is compared with its
adapter on random numbers, and left alone where the results differ.
"""

import dataclasses
import inspect
import logging
import re
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from qmir_ao.capture import adapters, cross_scan
from qmir_ao.capture.operands import refuse
from qmir_ao.capture.registry import name_of
from qmir_ao.capture.swap import Adapter, namespaces

log = logging.getLogger(__name__)

_NO_EFFECT = frozenset(
    {"nrows", "backnrows", "oflex", "ssoflex", "backend", "checkpoint_lvl", "force_torch"}
)
"""Arguments that choose a kernel or a memory strategy, not a result."""
TOLERANCE = 1e-4
"""Largest relative difference between an original, which computes in float32, and its adapter."""


@dataclasses.dataclass(frozen=True)
class Known:
    """One published function.

    Attributes:
        names: of plain functions.
        classes: pattern of the names of autograd functions.
        leading: its first argument names.
        adapter: what stands for it.
        example: random arguments by name, from a function that makes tensors of given sizes.
    """

    names: tuple[str, ...]
    classes: str
    leading: tuple[str, ...]
    adapter: Adapter
    example: Callable[[Callable[..., Tensor]], dict[str, Any]]


def _scan_example(rand: Callable[..., Tensor]) -> dict[str, Any]:
    u, delta, A = rand(2, 4, 5), rand(2, 4, 5), -rand(4, 3)
    B, C = rand(2, 2, 3, 5), rand(2, 2, 3, 5)
    return {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": rand(4)}


def _inner_example(rand: Callable[..., Tensor]) -> dict[str, Any]:
    weights = {
        "conv1d_weight": rand(4, 1, 3),
        "conv1d_bias": rand(4),
        "x_proj_weight": rand(8, 4),
        "delta_proj_weight": rand(4, 2),
        "out_proj_weight": rand(5, 4),
        "out_proj_bias": None,
    }
    return {"xz": rand(2, 8, 6), **weights, "A": -rand(4, 3), "D": rand(4), "delta_bias": rand(4)}


KNOWN = (
    Known(
        ("selective_scan_fn", "selective_scan_ref", "selective_scan_torch"),
        r"SelectiveScan\w*",
        ("u", "delta", "A", "B", "C"),
        adapters.scan,
        _scan_example,
    ),
    Known(
        ("mamba_inner_fn", "mamba_inner_ref", "mamba_inner_fn_no_out_proj"),
        r"MambaInnerFn\w*",
        ("xz", "conv1d_weight", "conv1d_bias", "x_proj_weight", "delta_proj_weight"),
        adapters.inner,
        _inner_example,
    ),
    Known(
        ("causal_conv1d_fn", "causal_conv1d_ref"),
        r"CausalConv1dFn\w*",
        ("x", "weight"),
        adapters.causal_conv,
        lambda rand: {"x": rand(2, 4, 6), "weight": rand(4, 3), "bias": rand(4)},
    ),
    Known(
        ("cross_scan_fn",),
        r"CrossScan(Triton)?F?",
        ("x",),
        cross_scan.cross_scan,
        lambda rand: {"x": rand(2, 3, 4, 5)},
    ),
    Known(
        ("cross_merge_fn",),
        r"CrossMerge(Triton)?F?",
        ("y|ys",),
        cross_scan.cross_merge,
        lambda rand: {"y": rand(2, 4, 3, 4, 5)},
    ),
)
_BY_NAME = {name: known for known in KNOWN for name in known.names}


def _parameters(target: Any) -> list[inspect.Parameter] | None:
    """Arguments of a function, or of an autograd function's forward without its context."""
    is_class = isinstance(target, type)
    try:
        found = list(inspect.signature(target.forward if is_class else target).parameters.values())
    except (TypeError, ValueError):  # no signature: an extension's function
        return None
    return found[1:] if is_class and found and found[0].name == "ctx" else found


def _fits(known: Known, parameters: list[inspect.Parameter] | None) -> bool:
    if parameters is None or len(parameters) < len(known.leading):
        return False
    names = (p.name for p in parameters)
    return all(re.fullmatch(want, got) for want, got in zip(known.leading, names, strict=False))


def _bind(target: Any, known: Known, parameters: list[inspect.Parameter]) -> Adapter:
    """The adapter with the argument order of `target`."""
    signature = inspect.Signature(
        [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
    )
    understood = inspect.signature(known.adapter).parameters
    renamed = {"ys": "y"}

    def call(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given = {renamed.get(k, k): v for k, v in bound.arguments.items()}
        for name in [k for k in given if k not in understood]:
            value = given.pop(name)
            if name not in _NO_EFFECT and value is not None and value is not False and value != ():
                raise refuse(name_of(target), name, value, "None")
        return known.adapter(**given)

    return call


def _agrees(
    target: Any, known: Known, parameters: list[inspect.Parameter], device: torch.device
) -> bool:
    """False where the original can run here and gives another result than its adapter."""
    generator = torch.Generator().manual_seed(0)

    def rand(*size: int) -> Tensor:
        return torch.rand(size, generator=generator).to(device)

    names = {"ys": "y"}
    example = known.example(rand)
    given = {
        p.name: example[key] for p in parameters if (key := names.get(p.name, p.name)) in example
    }
    is_class = isinstance(target, type)
    try:
        with torch.no_grad():
            got = target.apply(*given.values()) if is_class else target(**given)
    except Exception as reason:  # it needs a GPU: then its name and arguments have to do
        log.debug("%s does not run on %s (%s)", name_of(target), device, reason)
        return True
    with torch.no_grad():
        want = _bind(target, known, parameters)(**given)
    same = (
        isinstance(got, Tensor)
        and got.shape == want.shape
        and torch.allclose(got.float(), want, rtol=TOLERANCE, atol=TOLERANCE)
    )
    if not same:
        log.warning("%s is not what its name says; it is captured as it stands", name_of(target))
    return same


def _is_ours(target: Any) -> bool:
    return str(getattr(target, "__module__", "")).partition(".")[0] == "qmir_ao"


def _function_classes() -> Iterator[type]:
    todo = list(torch.autograd.Function.__subclasses__())
    while todo:
        cls = todo.pop()
        yield cls
        todo.extend(cls.__subclasses__())


def _candidates(model: nn.Module) -> Iterator[tuple[Any, Known]]:
    seen: set[int] = set()
    for namespace in namespaces(model):
        for name in _BY_NAME.keys() & namespace.keys():
            seen_value = namespace[name]
            if callable(seen_value) and id(seen_value) not in seen:
                seen.add(id(seen_value))
                yield seen_value, _BY_NAME[name]
    for module in model.modules():
        for value in list(vars(module).values()):
            if isinstance(value, types.FunctionType) and id(value) not in seen:
                seen.add(id(value))
                if value.__name__ in _BY_NAME:
                    yield value, _BY_NAME[value.__name__]
    for cls in _function_classes():
        for known in KNOWN:
            if re.fullmatch(known.classes, cls.__name__):
                yield cls, known


def _extensions() -> Iterator[tuple[Any, Adapter]]:
    for name, module in list(sys.modules.items()):
        if name.rpartition(".")[2].startswith("selective_scan_cuda"):
            forward = getattr(module, "fwd", None)
            if callable(forward):
                yield forward, adapters.extension_scan


def known_functions(model: nn.Module) -> list[tuple[Any, Adapter]]:
    """Pairs (original, adapter) of the published functions that are imported at the moment."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    pairs = []
    for target, known in _candidates(model):
        parameters = None if _is_ours(target) else _parameters(target)
        if parameters is None or not _fits(known, parameters):
            continue
        if _agrees(target, known, parameters, device):
            pairs.append((target, _bind(target, known, parameters)))
    return [*pairs, *_extensions()]
