"""The torchao PT2E quantizer: annotates an exported graph with DLS and RFA."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.ao.quantization import QConfig, QConfigMapping
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.quantizer import (
    QuantizationAnnotation,
    QuantizationSpec,
    Quantizer,
)

from qmir_ao.errors import UnsupportedGraph
from qmir_ao.quant._bases import QmirFakeQuantize
from qmir_ao.quant.patterns import Pattern, is_constant, match, module_path, operand, unquantizable
from qmir_ao.quant.placement import (
    as_mapping,
    check_placement,
    float_by_default,
    overrules,
    resolve,
)
from qmir_ao.quant.qconfig import official_mapping, qmir_qconfig

FLOAT_REASON = "qmir_float_reason"
"""Key of `node.meta`: why a quantizable operator was left in float."""
NO_QCONFIG = "its QConfig is None"


class _Constructor:
    """What torchao calls for a fake-quantizer; ignores the arguments it repeats from the spec."""

    def __init__(self, make: Callable[..., nn.Module], **kwargs: Any) -> None:
        self._make, self._kwargs = make, kwargs
        self.__name__ = type(self).__name__

    def with_args(self, **_: Any) -> "_Constructor":
        return self

    def __call__(self) -> nn.Module:
        return self._make(**self._kwargs)


def _spec(make: Callable[..., nn.Module], **kwargs: Any) -> QuantizationSpec:
    probe = make(**kwargs)
    # torchao lets edges of one tensor share a quantizer when dtype, range and ch_axis agree: the
    # axis keeps a per-sample quantizer apart from a static one on the same tensor.
    return QuantizationSpec(
        dtype=probe.dtype,
        observer_or_fake_quant_ctr=_Constructor(make, **kwargs),
        quant_min=probe.quant_min,
        quant_max=probe.quant_max,
        qscheme=torch.per_tensor_affine,
        ch_axis=0 if probe.dynamic else None,
    )


def _attached(make: Callable[..., Any], kinds: set[str]) -> nn.Module:
    """A new activation quantizer that knows what reads its tensor."""
    module: nn.Module = make()
    if isinstance(module, QmirFakeQuantize):
        module.attach(kinds)
    return module


class _Readers:
    """Which kinds of operators read a tensor through one quantizer."""

    def __init__(self) -> None:
        self._kinds: dict[tuple[Any, ...], set[str]] = {}

    def of(self, source: Node, qconfig: QConfig) -> set[str]:
        """The kinds, to be read or added to."""
        spec = _spec(qconfig.activation)
        # What torchao compares before two edges share a quantizer.
        key = (source, spec.dtype, spec.quant_min, spec.quant_max, spec.ch_axis)
        return self._kinds.setdefault(key, set())


def _sources(node: Node, pattern: Pattern) -> list[Node]:
    """The activations of an operator that are tensors of the graph."""
    found = (operand(node, position) for position in pattern.activations)
    return [source for source in found if source is not None]


def annotate_node(node: Node, pattern: Pattern, qconfig: QConfig, readers: _Readers) -> None:
    """Attach the quantization annotation of one operator to its node."""
    inputs: dict[Node, QuantizationSpec] = {}
    constant = _spec(lambda: qconfig.activation().for_constant())
    for source in _sources(node, pattern):
        make = functools.partial(_attached, qconfig.activation, readers.of(source, qconfig))
        inputs[source] = constant if is_constant(source) else _spec(make)
    weight = None if pattern.weight is None else operand(node, pattern.weight)
    if weight is not None:
        inputs[weight] = _spec(qconfig.weight)
    node.meta["quantization_annotation"] = QuantizationAnnotation(
        input_qspec_map=inputs, _annotated=True
    )


class QmirQuantizer(Quantizer):  # type: ignore[misc]
    """Quantizer for `torchao`'s `prepare_qat_pt2e` / `prepare_pt2e`.

    Args:
        qconfig: a QConfig, or a QConfigMapping for per-module, per-type or per-operator settings
            (None as a QConfig keeps the operator in float).
        placement: "paper" (DLS on every activation of the body) or "official" (the published
            code's placement).
    """

    def __init__(
        self, qconfig: QConfig | QConfigMapping | None = None, *, placement: str = "paper"
    ) -> None:
        """Resolve the QConfig to a mapping; see the class."""
        super().__init__()
        check_placement(placement)
        chosen = qmir_qconfig if qconfig is None else qconfig
        self.mapping = official_mapping(chosen) if placement == "official" else as_mapping(chosen)

    def set_global(self, qconfig: QConfig | None) -> "QmirQuantizer":
        """Set the QConfig of every operator that has no setting of its own."""
        self.mapping.set_global(qconfig)
        return self

    def set_module_name(self, name: str, qconfig: QConfig | None) -> "QmirQuantizer":
        """Set the QConfig of a module and everything below it; None keeps it in float."""
        self.mapping.set_module_name(name, qconfig)
        return self

    def set_object_type(self, kind: Any, qconfig: QConfig | None) -> "QmirQuantizer":
        """Set the QConfig of a module class or operator; None keeps it in float."""
        self.mapping.set_object_type(kind, qconfig)
        return self

    def annotate(self, model: GraphModule) -> GraphModule:
        """Annotate every operator to be quantized; note the reason on those left in float.

        Raises:
            UnsupportedGraph: nothing to quantize, with what was found and why it stays float.
        """
        kept = float_by_default(model)
        chosen: list[tuple[Node, Pattern, QConfig]] = []
        for node in model.graph.nodes:
            pattern = match(model, node)
            if pattern is None:
                continue
            qconfig = resolve(self.mapping, node, pattern.kind)
            if qconfig is None:
                node.meta[FLOAT_REASON] = NO_QCONFIG
            elif node in kept and not overrules(self.mapping, module_path(node)):
                node.meta[FLOAT_REASON] = kept[node]
            elif (reason := unquantizable(model, node, pattern)) is not None:
                node.meta[FLOAT_REASON] = reason
            else:
                chosen.append((node, pattern, qconfig))
        if not chosen:
            raise nothing_to_quantize(model)
        readers = _Readers()
        for node, pattern, qconfig in chosen:
            for source in _sources(node, pattern):
                readers.of(source, qconfig).add(pattern.kind)
        for node, pattern, qconfig in chosen:
            annotate_node(node, pattern, qconfig, readers)
        return model

    def validate(self, model: GraphModule) -> None:
        """Nothing to check beyond what `annotate` guarantees (torchao calls this)."""


def nothing_to_quantize(model: GraphModule) -> UnsupportedGraph:
    """The error for a graph without a single operator to quantize."""
    reasons = [
        f"{n.name}: {n.meta[FLOAT_REASON]}" for n in model.graph.nodes if FLOAT_REASON in n.meta
    ]
    found = "; ".join(reasons) if reasons else "no linear, conv1d, conv2d or selective scan"
    return UnsupportedGraph(
        f"nothing to quantize in this model ({found}). Give the operator a QConfig of its own, "
        "such as QConfigMapping().set_module_name('conv', qmir_qconfig), to overrule the default."
    )
