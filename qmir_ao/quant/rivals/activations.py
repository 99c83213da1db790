"""Activation rivals: LSQ, LSQ+, PACT, PAMS, QuantSR, soft and plain straight-through estimators.

All are static: step and shift do not depend on the input, so each is a DLS with constants when it
is lowered. Every one starts from a first batch.
"""

from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qmir_ao.ops._affine import gradient_scale
from qmir_ao.ops.static import static_fake_quant
from qmir_ao.quant._bases import parameter
from qmir_ao.quant._graph import constants
from qmir_ao.quant.functions import (
    round_soft,
    round_ste,
    scale_gradient,
    straight_through,
    with_decay,
)
from qmir_ao.quant.init import static_grid
from qmir_ao.quant.patterns import CONV, LINEAR
from qmir_ao.quant.rfa import STEP_FLOOR
from qmir_ao.quant.static import StaticFakeQuantize

PACT_DECAY = 1e-4
"""PACT's L2 penalty on its clipping level."""
PACT_START = 10.0
"""Published start of the clipping level of PACT and PAMS."""


class LSQFakeQuantize(StaticFakeQuantize):
    """LSQ: one learned step, no shift.

    Arguments and errors as `StaticFakeQuantize`; `init` is "lsq", as published, by default.

    Source: Esser et al., arXiv 1902.08153.
    """

    learns_shift = False


class LSQPlusFakeQuantize(StaticFakeQuantize):
    """LSQ+: a learned step and a learned shift, both with LSQ's gradient scale.

    Arguments and errors as `StaticFakeQuantize`; `init` is "mse", as published, by default.

    Source: Bhalgat et al., arXiv 2004.09576.
    """

    scales_shift_gradient = True
    default_init = "mse"

    def __init__(self, bits: int = 4, *, signed: str = "always", **settings: Any) -> None:
        super().__init__(bits, signed=signed, **settings)


class STEFakeQuantize(StaticFakeQuantize):
    """Straight-through estimator alone: the grid of the first batch stays, nothing is learned.

    Arguments and errors as `StaticFakeQuantize`; `init` is "mse" by default.

    Source: Bengio et al., arXiv 1308.3432.
    """

    learns_shift = False
    default_init = "mse"

    def __init__(self, bits: int = 4, **settings: Any) -> None:
        super().__init__(bits, **settings)
        self.step.requires_grad_(False)


class SoftSTEFakeQuantize(LSQFakeQuantize):
    """LSQ whose rounding passes the gradient of a tanh ramp.

    Arguments and errors as `StaticFakeQuantize`.

    Source: the soft estimator of QuantSR (NeurIPS 2023).
    """

    def fake_quantize(self, x: Tensor) -> Tensor:
        """Values on the grid; see `round_soft` for the gradient."""
        step = scale_gradient(self.step, gradient_scale(x.numel(), self.quant_max))
        codes = round_soft(torch.clamp(x / step, self.quant_min, self.quant_max))
        return step * codes


class QuantSRFakeQuantize(SoftSTEFakeQuantize):
    """QuantSR's redistribution: soft rounding, and a learned threshold for each input channel.

    The thresholds (`tau`) are added to what enters a linear layer or a convolution and never
    subtracted, as published; what only a scan reads has none.

    Arguments and errors as `StaticFakeQuantize`.

    Source: Qin et al., QuantSR (NeurIPS 2023), and its code.
    """

    def __init__(
        self, bits: int = 4, *, factory_kwargs: dict[str, Any] | None = None, **settings: Any
    ) -> None:
        super().__init__(bits, factory_kwargs=factory_kwargs, **settings)
        self.tau = parameter(torch.zeros(1), factory_kwargs)
        self.tau.requires_grad_(False)
        self.channel_dim: int | None = None

    def attach(self, kinds: set[str]) -> None:
        """Find the channel axis: 1 before a convolution, the last before a linear layer."""
        if CONV.kind in kinds:
            self.channel_dim = 1
        elif LINEAR.kind in kinds:
            self.channel_dim = -1
        self.tau.requires_grad_(self.channel_dim is not None)

    def observe(self, x: Tensor) -> Tensor:
        """Keep a sample; the first batch gives the number of thresholds."""
        if self._seen == 0:
            self._size_thresholds(x)
        return cast(Tensor, super().observe(x))

    def start(self, values: Tensor) -> None:
        """LSQ's start, and a threshold of zero for each channel."""
        super().start(values)
        # A calibration's sample is flat: `observe` has seen the channels.
        if values.dim() > 1:
            self._size_thresholds(values)

    def _size_thresholds(self, x: Tensor) -> None:
        if self.channel_dim is not None and x.numel():
            shape = [1] * x.dim()
            shape[self.channel_dim] = x.shape[self.channel_dim]
            self.tau.data = torch.zeros(shape).to(self.tau)

    def may_resize(self, name: str, saved: Tensor) -> bool:
        """The thresholds take the number of channels that a checkpoint brings."""
        return name == "tau" and saved.numel() == max(saved.shape, default=1)

    def fake_quantize(self, x: Tensor) -> Tensor:
        """Values on the grid, of the input plus its thresholds."""
        return super().fake_quantize(x + self.tau if self._has_tau() else x)

    def _has_tau(self) -> bool:
        return self.channel_dim is not None and not self.constant

    def emit(self, model: GraphModule, node: Node) -> None:
        """Add the thresholds in float, then quantize and dequantize."""
        if self._has_tau():
            source = node.all_input_nodes[0]
            (tau,) = constants(model, node, tau=self.tau)
            added = model.graph.call_function(torch.ops.aten.add.Tensor, (source, tau))
            added.meta["qmir_source"] = node.name
            node.replace_input_with(source, added)
        super().emit(model, node)


class _ClipFakeQuantize(StaticFakeQuantize):
    """What PACT and PAMS share: the learned quantity is the clipping level, not the step."""

    learns_shift = False
    symmetric = True

    def __init__(
        self, bits: int = 4, *, factory_kwargs: dict[str, Any] | None = None, **settings: Any
    ) -> None:
        super().__init__(bits, factory_kwargs=factory_kwargs, **settings)
        del self.step
        self.clip = parameter(torch.full((1,), PACT_START), factory_kwargs)

    def start(self, values: Tensor) -> None:
        """Set the clipping level from the searched (or other) step of a first batch."""
        step, _ = static_grid(
            values, self.init, self.bits, self.quant_min, self.quant_max, shifted=False
        )
        self.clip.fill_(step * self.quant_max)

    def grid(self) -> tuple[Tensor, Tensor]:
        """Step and shift of x_hat = step * code - shift, shape (1,)."""
        return self.clip.detach() / self.quant_max, self.shift.detach()

    @torch.no_grad()
    def project(self) -> None:
        """Keep the clipping level positive."""
        if torch.compiler.is_compiling() or float(self.clip.detach()) < STEP_FLOOR:
            self.clip.clamp_(min=STEP_FLOOR)


class PACTFakeQuantize(_ClipFakeQuantize):
    """PACT: a learned clipping level that only clipped values move, with an L2 penalty.

    A tensor with negative values is clipped on both sides. Arguments and errors as
    `StaticFakeQuantize`; `init` is "mse" by default, `preset="paper"` starts at 10.

    Source: Choi et al., arXiv 1805.06085.
    """

    default_init = "mse"

    def start(self, values: Tensor) -> None:
        """The published constant, or a level from the first batch."""
        if self.preset is None:
            super().start(values)

    def fake_quantize(self, x: Tensor) -> Tensor:
        """Values on the grid; the gradient of the level is that of the clipping alone."""
        clip = with_decay(self.clip, PACT_DECAY)
        low = -clip if self.quant_min < 0 else torch.zeros_like(clip)
        clipped = torch.minimum(torch.maximum(x, low), clip)
        step, shift = self.grid()
        with torch.no_grad():
            on_grid = static_fake_quant(clipped, step, shift, self.quant_min, self.quant_max)
        return straight_through(clipped, on_grid)


class PAMSFakeQuantize(_ClipFakeQuantize):
    """PAMS: a learned, symmetric clipping level with the gradient of the whole expression.

    In the published first epoch nothing is clipped and the level follows each batch: the mean over
    its images of their largest magnitude. Here the first batch alone sets it, with
    `preset="paper"` to that mean, otherwise to the largest magnitude of all (`init="minmax"`).
    Arguments and errors as `StaticFakeQuantize`.

    Source: Li et al., PAMS (ECCV 2020), and its code.
    """

    default_init = "minmax"

    def __init__(self, bits: int = 4, *, signed: str = "always", **settings: Any) -> None:
        super().__init__(bits, signed=signed, **settings)

    def start(self, values: Tensor) -> None:
        """The published level of a first batch, or a level as `init` says."""
        if self.preset is None or values.dim() < 2:
            return super().start(values)
        self.clip.copy_(values.flatten(1).abs().amax(1).mean().clamp(min=STEP_FLOOR))

    def fake_quantize(self, x: Tensor) -> Tensor:
        """Values on the grid; inside the clip the level moves by the rounding error."""
        step = self.clip / self.quant_max
        limit = torch.minimum(torch.maximum(x, -self.clip), self.clip)
        return step * round_ste(limit / step)
