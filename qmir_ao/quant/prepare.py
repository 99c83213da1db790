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
from qmir_ao.quant.modes import with_modes
from qmir_ao.quant.patterns import (
    Pattern,
    is_constant,
    match,
    module_of,
    module_path,
    operand,
    unquantizable,
)
from qmir_ao.quant.placement import (
    as_mapping,
    check_placement,
    float_by_default,
    overrules,
    resolve,
    spread_operators,
)
from qmir_ao.quant.qconfig import official_mapping
from qmir_ao.quant.quantizer import FLOAT_REASON, NO_QCONFIG, QmirQuantizer, nothing_to_quantize

aten = torch.ops.aten


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
    hidden = _retarget(graph_module, aten.batch_norm.default, _batch_norm)
    with _quiet():
        prepared = prepare_qat_pt2e(graph_module, quantizer)
    if hidden:
        _retarget(prepared, _batch_norm, aten.batch_norm.default)
        prepared.recompile()
    materialize(prepared)
    return with_modes(prepared)


def _batch_norm(*args: Any) -> torch.Tensor:
    """A batch norm that torchao does not know.

    It would scale the weight of the convolution before by the running variance, for backends that
    fold the two; here the norm stays on its own, and the convolution may be called elsewhere too.
    """
    y: torch.Tensor = aten.batch_norm.default(*args)
    return y


def _retarget(graph_module: GraphModule, old: Any, new: Any) -> int:
    nodes = [n for n in graph_module.graph.nodes if n.target is old]
    for node in nodes:
        node.target = new
    return len(nodes)


def prepare_traced(
    model: nn.Module,
    qconfig: QConfig | QConfigMapping,
    placement: str,
    graph: GraphModule | None = None,
) -> GraphModule:
    """Run torch.ao's `prepare_qat_fx` on a model and bring its quantizers to the same places.

    Args:
        model: what is traced.
        qconfig: a QConfig, or a QConfigMapping.
        placement: "paper" or "official".
        graph: a trace of the model that was rewritten, to be prepared in its place.

    Raises:
        CaptureError: symbolic tracing failed.
        UnsupportedGraph: nothing to quantize.
    """
    check_placement(placement)
    mapping = official_mapping(qconfig) if placement == "official" else as_mapping(qconfig)
    # A trace fixes what `self.training` decides; a graph of the evaluation is what lowering needs.
    model.eval()
    traced = trace_graph(model) if graph is None else graph
    full, reasons = _mapping_by_layer(traced, mapping)
    with _quiet():
        prepared = _prepare_graph(traced, full) if graph is not None else _prepare(model, full)
    for node in prepared.graph.nodes:
        pattern = match(prepared, node)
        if pattern is not None and node.name in reasons:
            node.meta[FLOAT_REASON] = reasons[node.name]
        elif pattern is not None and resolve(full, node, pattern.kind) is None:
            node.meta[FLOAT_REASON] = NO_QCONFIG
    _settle_quantizers(prepared, full)
    if not any(is_fake_quantize(m) for m in prepared.modules()):
        raise nothing_to_quantize(prepared)
    materialize(prepared)
    return with_modes(prepared)


def _prepare(model: nn.Module, mapping: QConfigMapping) -> GraphModule:
    from torch.ao.quantization.quantize_fx import prepare_qat_fx

    return prepare_qat_fx(model, mapping, (), backend_config=qmir_backend_config())


def _prepare_graph(traced: GraphModule, mapping: QConfigMapping) -> GraphModule:
    """What `prepare_qat_fx` does after its own trace.

    A second trace of a graph would lose which module a function was called in, and with it the
    settings by module name.
    """
    from torch.ao.quantization.fx.custom_config import FuseCustomConfig, PrepareCustomConfig
    from torch.ao.quantization.fx.prepare import prepare
    from torch.ao.quantization.quantize_fx import _attach_meta_to_node_if_not_exist, _fuse_fx

    scopes = {}
    for node in traced.graph.nodes:
        stack = list((node.meta.get("nn_module_stack") or {"": ("", None)}).values())
        scopes[node.name] = stack[-1]
    traced.train()
    _attach_meta_to_node_if_not_exist(traced)
    config = qmir_backend_config()
    fused = _fuse_fx(traced, True, FuseCustomConfig(), config)
    return prepare(
        fused,
        mapping,
        True,
        scopes,
        example_inputs=(),
        prepare_custom_config=PrepareCustomConfig(),
        _equalization_config=QConfigMapping(),
        backend_config=config,
    )


def trace_graph(model: nn.Module) -> GraphModule:
    """Trace a network symbolically, with the leaves that torch.ao's preparation keeps whole.

    Raises:
        CaptureError: the trace failed; the message says how to go on.
    """
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


def _mapping_by_layer(
    traced: GraphModule, mapping: QConfigMapping
) -> tuple[QConfigMapping, dict[str, str]]:
    """A copy of the mapping that names every layer, and why some stay in float by default.

    torch.ao gives a module its weight quantizer without a look at patterns of names. The reasons
    are by node name, which the preparation's own trace gives again.
    """
    full = QConfigMapping.from_dict(mapping.to_dict())
    spread_operators(full)
    kept = float_by_default(traced)
    reasons = {}
    for node in traced.graph.nodes:
        pattern, path = match(traced, node), module_path(node)
        if pattern is None:
            continue
        stays = unquantizable(traced, node, pattern)
        if stays is None and node in kept and not overrules(mapping, path):
            stays = kept[node]
        if stays is not None:
            reasons[node.name] = stays
        if node.op == "call_module":
            full.set_module_name(path, None if stays else resolve(mapping, node, pattern.kind))
    return full, reasons


def _settle_quantizers(prepared: GraphModule, mapping: QConfigMapping) -> None:
    """Leave a quantizer only where it feeds a quantized operand, and of the operand's own QConfig.

    `prepare_qat_fx` also quantizes the outputs of an operator, with the producer's QConfig, and
    lets all readers of a tensor share the quantizer of the first, whatever their QConfigs say.
    """
    made: dict[tuple[Node, str], Node] = {}
    for node in list(prepared.graph.nodes):
        if not is_fake_quantize(module_of(prepared, node)):
            continue
        source = node.all_input_nodes[0]
        for user in list(node.users):
            pattern = match(prepared, user)
            wanted = None
            if pattern is not None and FLOAT_REASON not in user.meta:
                wanted = _wanted(user, pattern, node, mapping)
            if wanted is None:
                user.replace_input_with(node, source)
            else:
                user.replace_input_with(node, _quantizer_for(prepared, node, wanted, made))
        if not node.users:
            prepared.graph.erase_node(node)
            prepared.delete_submodule(str(node.target))
    prepared.recompile()


def _wanted(
    user: Node, pattern: Pattern, node: Node, mapping: QConfigMapping
) -> QmirFakeQuantize | None:
    """The quantizer that an operator asks for where it reads `node`; None for no quantizer."""
    qconfig = resolve(mapping, user, pattern.kind)
    if qconfig is None:
        return None
    made: QmirFakeQuantize | None = None
    if pattern.weight is not None and operand(user, pattern.weight) is node:
        made = qconfig.weight()
    elif any(operand(user, position) is node for position in pattern.activations):
        made = qconfig.activation()
    return made


def _quantizer_for(
    prepared: GraphModule,
    node: Node,
    wanted: QmirFakeQuantize,
    made: dict[tuple[Node, str], Node],
) -> Node:
    """`node` if it quantizes as wanted, else a quantizer of the same tensor that does."""
    source = node.all_input_nodes[0]
    made.setdefault((source, repr(module_of(prepared, node))), node)
    key = (source, repr(wanted))
    if key not in made:
        name = f"{node.target}_{len(made)}"
        prepared.add_submodule(name, wanted)
        with prepared.graph.inserting_after(node):
            made[key] = prepared.graph.call_module(name, (source,))
    return made[key]


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
