"""Insert trainable DLS and RFA fake-quantizers, through PT2E or through FX."""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.ao.quantization import QConfig, QConfigMapping
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e

from qmir_ao.errors import CaptureError
from qmir_ao.quant._bases import QmirFakeQuantize
from qmir_ao.quant.backend_config import qmir_backend_config
from qmir_ao.quant.constants import constant_value
from qmir_ao.quant.patterns import (
    Pattern,
    is_constant,
    match,
    module_of,
    module_path,
    operand,
)
from qmir_ao.quant.placement import (
    as_mapping,
    check_placement,
    explicit,
    float_by_default,
    resolve,
)
from qmir_ao.quant.qconfig import official_mapping
from qmir_ao.quant.quantizer import FLOAT_REASON, QmirQuantizer, nothing_to_quantize

aten = torch.ops.aten
_TRAINING_ARGUMENT = {
    aten.dropout.default: 2,
    aten.feature_dropout.default: 2,
    aten.batch_norm.default: 5,
}


def is_fake_quantize(module: nn.Module | None) -> bool:
    """Whether a module is a fake-quantizer of torch.ao's or torchao's kind."""
    return isinstance(module, torch.ao.quantization.FakeQuantizeBase)


def prepare_exported(
    graph_module: GraphModule, qconfig: QConfig | QConfigMapping, placement: str
) -> GraphModule:
    """Run torchao's PT2E preparation on an exported graph and finish the quantizers.

    Raises:
        UnsupportedGraph: nothing to quantize.
        ConfigError: bad QConfig or placement.
    """
    quantizer = QmirQuantizer(qconfig, placement=placement)
    with _quiet():
        prepared = prepare_qat_pt2e(graph_module, quantizer)
    materialize(prepared)
    return with_modes(prepared)


class PreparedGraph(GraphModule):
    """An exported graph with working `train()` and `eval()`, which torch.export takes away.

    A subclass, so that copies of the model have them too.
    """

    def train(self, mode: bool = True) -> "PreparedGraph":
        """Switch dropout, batch norm and the quantizers to training (or evaluation)."""
        for node in self.graph.nodes:
            position = _TRAINING_ARGUMENT.get(node.target)
            if position is not None:
                node.update_arg(position, mode)
        self.recompile()
        for module in self.modules():
            module.training = mode
        return self

    def eval(self) -> "PreparedGraph":
        """Switch to evaluation."""
        return self.train(False)


def with_modes(graph_module: GraphModule) -> PreparedGraph:
    """The same graph as a `PreparedGraph`, in training mode."""
    prepared = PreparedGraph(graph_module, graph_module.graph)
    prepared.meta.update(graph_module.meta)
    return prepared.train()


def prepare_traced(
    model: nn.Module, qconfig: QConfig | QConfigMapping, placement: str
) -> GraphModule:
    """Run torch.ao's `prepare_qat_fx` on a model and bring its quantizers to the same places.

    Raises:
        CaptureError: symbolic tracing failed.
        UnsupportedGraph: nothing to quantize.
    """
    from torch.ao.quantization.quantize_fx import prepare_qat_fx

    check_placement(placement)
    mapping = official_mapping(qconfig) if placement == "official" else as_mapping(qconfig)
    traced = _trace(model)
    full, reasons = _keep_in_float(traced, mapping)
    with _quiet():
        prepared = prepare_qat_fx(model.train(), full, (), backend_config=qmir_backend_config())
    _take_out_output_quantizers(prepared, full)
    for node in prepared.graph.nodes:
        if match(prepared, node) and module_path(node) in reasons:
            node.meta[FLOAT_REASON] = reasons[module_path(node)]
    if not any(is_fake_quantize(m) for m in prepared.modules()):
        raise nothing_to_quantize(prepared)
    materialize(prepared)
    return prepared


def _trace(model: nn.Module) -> GraphModule:
    from torch.ao.quantization.fx.tracer import QuantizationTracer

    tracer = QuantizationTracer([], [])
    try:
        return GraphModule(model, tracer.trace(model))
    except Exception as error:  # tracing runs the user's forward: anything may come out of it
        raise CaptureError(
            f"symbolic tracing of {type(model).__name__} failed: {type(error).__name__}: "
            f"{str(error).strip().splitlines()[0][:300] if str(error) else ''}. "
            "Pass example_inputs=(x,) to prepare_qat to capture by torch.export instead, which "
            "handles control flow on shapes."
        ) from error


def _keep_in_float(
    traced: GraphModule, mapping: QConfigMapping
) -> tuple[QConfigMapping, dict[str, str]]:
    """A copy of the mapping in which what stays in float by default has None, and the reasons."""
    full = QConfigMapping.from_dict(mapping.to_dict())
    reasons = {}
    for node, reason in float_by_default(traced).items():
        path = module_path(node)
        if path and not explicit(mapping, path)[0] and node.op == "call_module":
            full.set_module_name(path, None)
            reasons[path] = reason
    return full, reasons


def _take_out_output_quantizers(prepared: GraphModule, mapping: QConfigMapping) -> None:
    """Leave activation quantizers only where they feed a quantized operand.

    `prepare_qat_fx` also quantizes the outputs of an operator, with the producer's QConfig.
    """
    scopes = prepared.meta["_observed_graph_module_attrs"].node_name_to_scope
    for node in list(prepared.graph.nodes):
        module = module_of(prepared, node)
        if not is_fake_quantize(module):
            continue
        source = node.all_input_nodes[0]
        produced = match(prepared, source) is not None and not is_constant(source)
        for user in list(node.users):
            pattern = match(prepared, user)
            positions = () if pattern is None else (*pattern.activations, pattern.weight)
            used = [i for i in positions if i is not None and operand(user, i) is node]
            if pattern is None or not used or _wants(user, pattern, mapping, scopes) is None:
                user.replace_input_with(node, source)
            elif produced:
                _requantize(prepared, user, node, source, _wants(user, pattern, mapping, scopes))
        if not node.users:
            prepared.graph.erase_node(node)
            prepared.delete_submodule(str(node.target))
    prepared.recompile()


def _wants(
    user: Node, pattern: Pattern, mapping: QConfigMapping, scopes: dict[str, Any]
) -> QConfig | None:
    scope = scopes.get(user.name)
    if user.op != "call_module" and scope:
        named, qconfig = explicit(mapping, scope[0])
        if named:
            return qconfig
    return resolve(mapping, user, pattern.kind)[1]


def _requantize(
    prepared: GraphModule, user: Node, node: Node, source: Node, qconfig: QConfig | None
) -> None:
    """Give a consumer its own quantizer where the producer's is of another kind or width."""
    if qconfig is None:
        return
    wanted = qconfig.activation()
    have: Any = prepared.get_submodule(str(node.target))
    if repr(wanted) == repr(have):
        return
    name = f"{node.target}_{user.name}"
    prepared.add_submodule(name, wanted)
    with prepared.graph.inserting_before(user):
        own = prepared.graph.call_module(name, (source,))
    user.replace_input_with(node, own)


def materialize(prepared: GraphModule) -> None:
    """Size the weight quantizers from their weights; tell the others what they quantize."""
    for owner in prepared.modules():
        weight_quantizer: Any = getattr(owner, "weight_fake_quant", None)
        if isinstance(weight_quantizer, QmirFakeQuantize):
            weight: Any = owner.weight
            weight_quantizer.materialize(weight, weight.shape[0])
    for node in prepared.graph.nodes:
        module: Any = module_of(prepared, node)
        if not isinstance(module, QmirFakeQuantize):
            continue
        source = node.all_input_nodes[0]
        if module.quantizes_weights:
            weight = constant_value(prepared, source)
            module.materialize(weight, weight.shape[0])
        elif is_constant(source):
            own = module.for_constant()
            if own is not module:
                own.train(module.training)
                prepared.set_submodule(str(node.target), own)
        else:
            module.attach({p.kind for user in node.users if (p := match(prepared, user))})


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch.ao announces its own deprecation on every call; users of this package cannot act."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s).*torch.ao.quantization is deprecated")
        warnings.filterwarnings("ignore", category=UserWarning, module="torch")
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
        yield
