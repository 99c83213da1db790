"""Post-training calibration: quantizers initialised from data, nothing trained."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from qmir_ao.errors import ConfigError, UnsupportedGraph
from qmir_ao.quant._bases import QmirFakeQuantize


def calibrate_quantizers(
    prepared: GraphModule,
    data: Iterable[Any],
    *,
    progress: Callable[[int], None] | None = None,
) -> GraphModule:
    """Initialise every activation quantizer from what float batches bring to it.

    The batches run through the network with all quantizers switched off, so each one sees the
    float network's own activations. Weight quantizers have their start already.

    Args:
        prepared: from `prepare_ptq` or `prepare_qat`; changed in place.
        data: tensors, or sequences of the positional inputs; a DataLoader of (input, target) pairs
            serves as well, since surplus entries are ignored.
        progress: called with the number of batches done.

    Raises:
        ConfigError: no batch, or one that is no tensor.
        UnsupportedGraph: no quantizer in the graph.
        NonFiniteError: a batch makes NaN or infinity somewhere.
    """
    quantizers = {n: m for n, m in prepared.named_modules() if isinstance(m, QmirFakeQuantize)}
    if not quantizers:
        raise UnsupportedGraph(
            "calibrate: the model holds no fake-quantizer; pass what prepare_ptq returns"
        )
    count = sum(node.op == "placeholder" for node in prepared.graph.nodes)
    weights = [m for m in quantizers.values() if m.quantizes_weights and m._quantizing]
    others = {n: m for n, m in quantizers.items() if not m.quantizes_weights}
    done = 0
    prepared.eval()
    try:
        for module in weights:
            module.enable_fake_quant(False)
        for module in others.values():
            module.begin_calibration()
        with torch.no_grad():
            for batch in data:
                prepared(*_inputs(batch, count))
                done += 1
                if progress is not None:
                    progress(done)
    finally:
        for module in weights:
            module.enable_fake_quant(True)
        seen = {name: module.finish_calibration() for name, module in others.items()}
    if not done:
        raise ConfigError("calibrate: data holds no batch; pass at least one input tensor")
    blind = [name for name, has in seen.items() if not has]
    if blind:
        raise ConfigError(f"calibrate: no data reached {blind[:3]}; do the inputs have any pixels?")
    return prepared


def _inputs(batch: Any, count: int) -> Sequence[Tensor]:
    listed = tuple(batch) if isinstance(batch, list | tuple) else (batch,)
    inputs = listed[:count]
    if len(inputs) < count or not all(isinstance(x, Tensor) for x in inputs):
        raise ConfigError(
            f"calibrate: a batch must be a tensor or a sequence of {count} tensors, got "
            f"{type(batch).__name__}"
        )
    return inputs
