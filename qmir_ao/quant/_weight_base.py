"""What the weight quantizers share: a step for the tensor or for each output channel."""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from qmir_ao.ops._affine import check_finite
from qmir_ao.quant._bases import QmirFakeQuantize, parameter
from qmir_ao.quant.spec import check_bits, choose, code_range

GRANULARITIES = ("per_channel", "per_tensor")


class SteppedWeightFakeQuantize(QmirFakeQuantize):
    """Base of the weight quantizers.

    Args:
        bits: 2 to 8.
        preset: kept for the subclass.
        granularity: "per_channel" (dim 0 of the weight) or "per_tensor", of the steps.
        init: kept for the subclass.
        factory_kwargs: device, passed by torch.ao.

    Raises:
        ConfigError: unknown bits or granularity.
    """

    ch_axis = 0
    quantizes_weights = True

    def __init__(
        self,
        bits: int,
        preset: str | None,
        granularity: str,
        init: str,
        factory_kwargs: dict[str, Any] | None,
    ) -> None:
        super().__init__(check_bits(bits), *code_range(bits))
        self.preset, self.init = preset, init
        self.granularity = choose("granularity", granularity, GRANULARITIES)
        per_channel = self.granularity == "per_channel"
        self.qscheme = torch.per_channel_affine if per_channel else torch.per_tensor_affine
        self.step = parameter(torch.ones(1), factory_kwargs)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def materialize(self, weight: Tensor, channels: int | None = None) -> None:
        """Size and initialise the parameters for a weight.

        The parameter objects stay the same, so an optimizer made before this call still has them.

        Args:
            weight: the weight to quantize.
            channels: number of output channels; dim 0 of the weight by default.

        Raises:
            NonFiniteError: the weight holds NaN or infinity.
        """
        weight = weight.detach().to(self.step.device)
        check_finite("weight_fake_quant", "the weight", weight)
        groups = 1
        if self.granularity == "per_channel" and weight.dim() > 0:
            groups = weight.shape[0] if channels is None else channels
        rows = weight.reshape(groups, -1)
        step = self._start(rows) if weight.numel() else torch.ones(groups)
        self.step.data = step.to(self.step).clone()
        self.mark_initialized()

    @abstractmethod
    def _start(self, rows: Tensor) -> Tensor:
        """Steps to start from, one for each row of the weight: (groups,)."""

    def extra_repr(self) -> str:
        """Settings, for printing a model."""
        return (
            f"bits={self.bits}, preset={self.preset!r}, granularity={self.granularity!r}, "
            f"init={self.init!r}"
        )
