"""The two fake-quantizer bases under one class, and torchao imported without its noise.

torchao's converter recognises only its own base, torch.ao's passes only theirs.
"""

import logging
import random
from typing import Any

import torch
from torch import nn
from torch.ao.quantization import FakeQuantizeBase as TorchBase
from torch.ao.quantization import PlaceholderObserver


def _torchao_base() -> Any:
    """Import torchao's own base class; what its import logs on a CPU build is held back."""
    loggers = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        from torchao.quantization.pt2e.fake_quantize import FakeQuantizeBase
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
    return FakeQuantizeBase


_TorchaoBase = _torchao_base()


CALIBRATION_ROWS = 64
"""Most samples that a quantizer keeps during calibration."""
CALIBRATION_VALUES = 8192
"""Most values of one sample that it keeps."""


class QmirFakeQuantize(TorchBase, _TorchaoBase):  # type: ignore[misc, valid-type]
    """What the quantizers of this package share: switches, initialisation state, loading.

    The switches live twice: in torch.ao's buffers, which a state_dict carries, and in Python
    attributes, so that torch.compile never branches on a tensor.
    """

    initialized: torch.Tensor
    dynamic = False
    """Whether step and shift depend on each input."""
    quantizes_weights = False
    """Whether the input is a parameter, to be given to `materialize` before training."""
    learning_rate_factor = 1.0
    """Learning rate of the quantizer's parameters in units of the network's."""
    dtype = torch.int8
    qscheme: torch.qscheme = torch.per_tensor_affine
    ch_axis = -1

    def __init__(self, bits: int, quant_min: int, quant_max: int) -> None:
        """Start enabled and not initialised.

        Args:
            bits: code width.
            quant_min: smallest code.
            quant_max: largest code.
        """
        super().__init__()
        self.bits, self.quant_min, self.quant_max = bits, quant_min, quant_max
        self.register_buffer("initialized", torch.zeros(1, dtype=torch.uint8))
        # torch.ao's FX preparation reads dtype and range from an observer at this name.
        self.activation_post_process = PlaceholderObserver(
            dtype=self.dtype, quant_min=quant_min, quant_max=quant_max
        )
        self._ready = False
        self._quantizing = True
        self._observing = True
        self._calibrating = False
        self._rows: list[torch.Tensor] = []
        self._ends: list[torch.Tensor] = []
        self._seen = 0

    def enable_fake_quant(self, enabled: bool = True) -> None:
        """Quantize (True) or pass values through unchanged (False)."""
        self.fake_quant_enabled[0] = int(enabled)
        self._quantizing = bool(enabled)

    def enable_observer(self, enabled: bool = True) -> None:
        """Let the first training batch initialise the quantizer (True), or not (False)."""
        self.observer_enabled[0] = int(enabled)
        self._observing = bool(enabled)

    def begin_calibration(self) -> None:
        """Pass values through and keep samples of them until `finish_calibration`."""
        self._calibrating, self._rows, self._ends, self._seen = True, [], [], 0

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def observe(self, x: torch.Tensor) -> torch.Tensor:
        """Keep a sample of `x` (of each sample of the batch where the step is dynamic)."""
        if x.numel() == 0:
            return x
        rows = x.detach().float().reshape(self.sample_count(x), -1)
        stride = -(-rows.shape[1] // CALIBRATION_VALUES)
        if not self.dynamic:
            # The ends of all batches together stay exact, whatever the sample leaves out.
            ends = torch.stack([*rows.aminmax(), *self._ends]).aminmax()
            self._ends = list(ends)
        for row in rows[:, ::stride].clone():
            self._seen += 1
            if len(self._rows) < CALIBRATION_ROWS:
                self._rows.append(row)
            # Reservoir sampling: every row seen so far is equally likely to be kept.
            elif (place := random.Random(self._seen).randrange(self._seen)) < CALIBRATION_ROWS:
                self._rows[place] = row
        return x

    def sample_count(self, x: torch.Tensor) -> int:
        """Number of parts of `x` that have a step of their own: 1 where the step is static."""
        return 1

    def finish_calibration(self) -> bool:
        """Initialise from the samples; False where none came."""
        rows, ends = self._rows, self._ends
        self._rows, self._ends, self._calibrating = [], [], False
        if not rows:
            return False
        if self.dynamic:
            count = min(row.numel() for row in rows)
            self.start_from(torch.stack([row[:count] for row in rows]))
        else:
            self.start_from(torch.cat([*rows, torch.stack(ends)]))
        return True

    def start_from(self, rows: torch.Tensor) -> None:
        """Initialise from the rows that `observe` kept."""
        self.initialize(rows)

    def materialize(self, weight: torch.Tensor, channels: int | None = None) -> None:
        """Size and initialise from a weight; only weight quantizers have something to do."""

    def initialize(self, x: torch.Tensor) -> None:
        """Set the parameters from values; weight quantizers have `materialize` instead."""

    def for_constant(self) -> "QmirFakeQuantize":
        """The quantizer to use instead where the input is a parameter (A, D, delta bias)."""
        return self

    def attach(self, kinds: set[str]) -> None:
        """Told by the preparation which kinds of operators read the quantized tensor."""

    def mark_initialized(self) -> None:
        """Record that the parameters hold an initialisation or a checkpoint."""
        self.initialized.fill_(1)
        self._ready = True

    def sync(self) -> None:
        """Bring the Python attributes in line with the buffers."""
        self._quantizing = bool(self.fake_quant_enabled[0])
        self._observing = bool(self.observer_enabled[0])
        self._ready = bool(self.initialized[0])

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # Per-channel parameters get their size from the weight; a checkpoint knows it as well.
        for name, parameter in self.named_parameters(recurse=False):
            saved = state_dict.get(prefix + name)
            if isinstance(saved, torch.Tensor) and self.may_resize(name, saved):
                parameter.data = parameter.data.new_empty(saved.shape)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self.sync()

    def may_resize(self, name: str, saved: torch.Tensor) -> bool:
        """Whether the parameter `name` takes the shape that a checkpoint brings."""
        return False


def parameter(values: torch.Tensor, factory_kwargs: dict[str, Any] | None) -> nn.Parameter:
    """A float32 parameter on the device that torch.ao asks for (its dtype is the model's own)."""
    device = None if factory_kwargs is None else factory_kwargs.get("device")
    return nn.Parameter(values.to(device=device, dtype=torch.float32))
