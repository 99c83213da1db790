"""DLS as a trainable fake-quantizer for torch.ao and torchao."""

import operator
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from qmir_ao.errors import ConfigError, QmirError
from qmir_ao.ops._affine import check_finite, group_count
from qmir_ao.ops.dls_fake_quant import dls_fake_quant
from qmir_ao.quant._bases import QmirFakeQuantize, parameter
from qmir_ao.quant._graph import constants, pass_through, put_in_place, quantize_dequantize
from qmir_ao.quant.init import (
    DLS_INITS,
    NAMED_PRESETS,
    Scalars,
    closed_form,
    named_preset,
    searched_scalars,
)
from qmir_ao.quant.patterns import CONV, CONV_1D, LINEAR, is_constant
from qmir_ao.quant.spec import check_bits, choose, code_range

PRESETS: dict[str | None, dict[str, Any]] = {
    None: {
        "init": "mse",
        "per_tensor": False,
        "per_token": True,
        "channel_shift": True,
        "cap": False,
        "clamp_output": False,
        "signed": "always",
    },
    "paper": {
        "init": "mu3s",
        "per_tensor": False,
        "per_token": False,
        "channel_shift": False,
        "cap": False,
        "clamp_output": False,
        "signed": "always",
    },
    "official": {
        "init": "mu3s",
        "per_tensor": True,
        "per_token": False,
        "channel_shift": False,
        "cap": True,
        "clamp_output": True,
        "signed": "auto",
    },
}

# The published code calls a tensor signed where its minimum lies below this.
SIGNED_BELOW = -1e-5


class DLSFakeQuantize(QmirFakeQuantize):
    """Fake-quantizer whose step and shift are predicted from each input's statistics.

    Args:
        bits: 2 to 8.
        preset: None for the defaults that won in this project's evidence, "paper" for the paper's
            plain form, "official" for bit parity with the published code. The arguments below
            override it.
        init: "mse" (search on the first training batch), "closed_form" (no data), or one of the
            paper's mu3s, mu4s, minmax, mu_halfrange, mid3s.
        per_tensor: statistics over the whole batch instead of per sample.
        per_token: statistics of each token (row of the last dimension) on its own, where nothing
            but linear layers reads the tensor: each of their sums then has one step for its inputs.
        channel_shift: learn one more shift for each channel of what linear layers or convolutions
            read, from the negative channel mean: levels are then not spent on constant offsets
            between channels. Lowering turns it into a bias.
        cap: limit the step to (max - min) / 2**bits. At 2 bits this stops the scale from learning.
        clamp_output: clip to the input's own range; the result then leaves the integer grid.
        signed: "always", or "auto" (decided by the first training batch, unsigned until then).
        constant: for operands that are parameters; implies `per_tensor` and `clamp_output`.
        factory_kwargs: device, passed by torch.ao.

    Raises:
        ConfigError: unknown bits, preset, init or signed.

    Source: arXiv 2503.21970, sections 3.3 and 7.1.
    """

    signed_range: Tensor
    dynamic = True

    def __init__(
        self,
        bits: int = 4,
        *,
        preset: str | None = None,
        init: str | None = None,
        per_tensor: bool | None = None,
        per_token: bool | None = None,
        channel_shift: bool | None = None,
        cap: bool | None = None,
        clamp_output: bool | None = None,
        signed: str | None = None,
        constant: bool = False,
        factory_kwargs: dict[str, Any] | None = None,
    ) -> None:
        given = {
            "init": init,
            "per_tensor": per_tensor,
            "per_token": per_token,
            "channel_shift": channel_shift,
            "cap": cap,
            "clamp_output": clamp_output,
            "signed": signed,
        }
        settings = dict(PRESETS[choose("preset", preset, PRESETS)])
        settings |= {key: value for key, value in given.items() if value is not None}
        is_signed = choose("signed", settings["signed"], ("always", "auto")) == "always"
        super().__init__(check_bits(bits), *code_range(bits, is_signed))
        self.preset, self.constant = preset, constant
        self.init = choose("init", settings["init"], DLS_INITS)
        self.signed = settings["signed"]
        self.per_tensor, self.cap = settings["per_tensor"], settings["cap"]
        if self.per_tensor and per_token:
            raise ConfigError("DLSFakeQuantize: per_tensor and per_token exclude each other")
        self.per_token = settings["per_token"] and not self.per_tensor
        self.tokens = False
        self._vector = False
        self.has_channel_shift = settings["channel_shift"]
        self.channel_dim: int | None = None
        self.clamp_output = settings["clamp_output"]
        self.register_buffer("signed_range", torch.tensor([int(is_signed)], dtype=torch.uint8))
        start = self._start()
        self.scale_weights = parameter(start.scale_weights, factory_kwargs)
        self.shift_weights = parameter(start.shift_weights, factory_kwargs)
        self.channel_shift: nn.Parameter | None = None
        self.to(self.scale_weights.device)
        if self.init != "mse" and self.signed == "always":
            self.mark_initialized()
        if constant:
            self.make_constant()

    def make_constant(self) -> None:
        """Treat the input as one parameter tensor: one group, clamped to its own range.

        The clamp keeps a negative operand such as A = -exp(A_log) negative on the grid.
        """
        self.constant = self.per_tensor = self.clamp_output = True

    def for_constant(self) -> "DLSFakeQuantize":
        """This quantizer, switched by `make_constant`."""
        self.make_constant()
        return self

    def sample_count(self, x: Tensor) -> int:
        """Number of samples with statistics of their own."""
        return group_count(x, self.per_tensor)

    def attach(self, kinds: set[str]) -> None:
        """Find out what a token and a channel are from what reads the tensor."""
        self.tokens = self.per_token and kinds == {LINEAR.kind}
        axes = {LINEAR.kind: -1, CONV.kind: 1}
        self.channel_dim = None
        if not self.has_channel_shift or len(kinds) != 1 or next(iter(kinds)) not in axes:
            return
        self.channel_dim = axes[next(iter(kinds))]
        if self.channel_shift is None:
            # One element until a first batch or a checkpoint tells the number of channels.
            self.channel_shift = nn.Parameter(torch.zeros_like(self.scale_weights[:1]))
            self.initialized.zero_()
            self._ready = False

    def may_resize(self, name: str, saved: Tensor) -> bool:
        """The channel shift takes the number of channels that a checkpoint brings."""
        return name == "channel_shift" and saved.dim() == 1

    def _offset(self, x: Tensor) -> Tensor:
        """The channel shift in the rank of `x`."""
        assert self.channel_shift is not None and self.channel_dim is not None
        shape = [1] * x.dim()
        shape[self.channel_dim] = -1
        return self.channel_shift.reshape(shape)

    def _centred(self, x: Tensor) -> Tensor:
        """`x` plus the channel shift."""
        return x if self.channel_dim is None else x + self._offset(x)

    def _centre(self, x: Tensor) -> None:
        """Start the channel shift at the negative channel means of a first batch."""
        self._vector = x.dim() == 1
        if self.channel_dim is None or self.channel_shift is None or x.dim() < 2:
            return
        others = [i for i in range(x.dim()) if i != self.channel_dim % x.dim()]
        self.channel_shift.data = -x.detach().double().mean(others).to(self.channel_shift)

    def _grouped(self, x: Tensor) -> Tensor:
        """`x` as the operators take it: dim 0 counts what has statistics of its own."""
        return x.flatten(0, -2) if self.tokens and x.dim() > 2 else x

    def _start(self) -> Scalars:
        if self.init in NAMED_PRESETS:
            return named_preset(self.init, self.bits)
        return closed_form(self.bits, self.quant_min)

    def forward(self, x: Tensor) -> Tensor:
        """Quantize and dequantize `x`.

        Raises:
            NonFiniteError: `x` holds NaN or infinity.
        """
        if self._calibrating:
            return self._collect(x)
        if not self._ready and self.training and self._observing:
            self.initialize(x)
        if not self._quantizing:
            return x
        y = self._quantize(self._centred(x))
        return y if self.channel_dim is None else y - self._offset(x)

    def _quantize(self, x: Tensor) -> Tensor:
        y = dls_fake_quant(
            self._grouped(x),
            self.scale_weights,
            self.shift_weights,
            self.quant_min,
            self.quant_max,
            self.per_tensor,
            self.cap,
            self.clamp_output,
        )
        return y.reshape(x.shape)

    @torch.no_grad()
    def _collect(self, x: Tensor) -> Tensor:
        """Keep a sample of `x` for calibration; its first batch gives the channel shift."""
        if self._seen == 0 and x.numel():
            self._centre(x)
        self.observe(self._grouped(self._centred(x)))
        return x

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Set the scalars, and the sign of the range, from a first batch."""
        if x.numel() == 0:
            return
        check_finite("dls_fake_quant", "x", x)
        self._centre(x)
        self.start_from(self._grouped(self._centred(x)))

    @torch.no_grad()
    def start_from(self, rows: Tensor) -> None:
        """Set the scalars from values of which dim 0 counts what has statistics of its own."""
        if self.signed == "auto":
            self.signed_range.fill_(int(float(rows.min()) < SIGNED_BELOW))
            self.quant_min, self.quant_max = code_range(self.bits, bool(self.signed_range[0]))
        if self.init in NAMED_PRESETS:
            found = self._start()
        elif self.init == "closed_form":
            found = closed_form(self.bits, self.quant_min)
        else:
            found = searched_scalars(rows, self.bits, self.quant_min, self.per_tensor)
        self.scale_weights.copy_(found.scale_weights)
        self.shift_weights.copy_(found.shift_weights)
        self.mark_initialized()

    def sync(self) -> None:
        """Bring the Python attributes in line with the buffers."""
        super().sync()
        self.quant_min, self.quant_max = code_range(self.bits, bool(self.signed_range[0]))

    def calculate_qparams(self, **_: Any) -> tuple[Tensor, Tensor]:
        """DLS has no static step: each input brings its own.

        Raises:
            QmirError: always; `convert` is the way to lower this quantizer.
        """
        raise QmirError(
            "DLSFakeQuantize has no static scale and zero point: step and shift are predicted for "
            "each input. Lower the model with qmir_ao.convert_and_lower, or use "
            "get_qmir_qconfig(activation='static') for a static quantizer"
        )

    def convert(self, model: GraphModule, node: Node) -> None:
        """Replace the call of this quantizer in a graph by operators.

        A dynamic activation becomes qparams, quantize and dequantize; anything that is not on the
        integer grid, or does not fit int8 codes, stays one `dls_fake_quant`.
        """
        if not self._quantizing:
            return pass_through(model, node)
        source, graph = node.all_input_nodes[0], model.graph
        aten, qmir = torch.ops.aten, torch.ops.qmir
        with graph.inserting_before(node):
            scalars = constants(
                model,
                node,
                scale_weights=self.scale_weights,
                shift_weights=self.shift_weights,
            )
            settings = (self.quant_min, self.quant_max, self.per_tensor, self.cap)
            off_grid = self.constant or self.clamp_output or is_constant(source)
            vector = self._vector or _is_vector(source)
            offset = self._emit_offset(model, node)
            rows = source = node.all_input_nodes[0]
            if self.tokens:
                if vector:
                    rows = graph.call_function(aten.unsqueeze.default, (source, 0))
                    rows.meta["qmir_source"] = node.name
                rows = graph.call_function(aten.flatten.using_ints, (rows, 0, -2))
                rows.meta["qmir_source"] = node.name
            if off_grid or self.quant_max > 127:
                new = graph.call_function(
                    qmir.dls_fake_quant.default, (rows, *scalars, *settings, self.clamp_output)
                )
                if self.tokens:
                    new = graph.call_function(aten.view_as.default, (new, source))
                if offset is not None:
                    new = graph.call_function(aten.sub.Tensor, (new, offset))
                new.meta["qmir_source"] = node.name
                return put_in_place(model, node, new)
            predicted = graph.call_function(qmir.dls_qparams.default, (rows, *scalars, *settings))
            step = graph.call_function(operator.getitem, (predicted, 0))
            shift = graph.call_function(operator.getitem, (predicted, 1))
            limits = (self.quant_min, self.quant_max)
            quantize_dequantize(model, node, (step, shift), *limits, offset)
        return None

    def _emit_offset(self, model: GraphModule, node: Node) -> Node | None:
        """Add the channel shift to the quantizer's input in the graph; return its node."""
        if self.channel_dim is None or self.channel_shift is None:
            return None
        shift, source = self.channel_shift.detach(), node.all_input_nodes[0]
        if self.channel_dim == 1 and shift.numel() > 1:
            one_dimensional = any(user.target in CONV_1D for user in node.users)
            shift = shift.reshape(-1, *[1] * (1 if one_dimensional else 2))
        (offset,) = constants(model, node, channel_shift=shift)
        added = model.graph.call_function(torch.ops.aten.add.Tensor, (source, offset))
        added.meta["qmir_source"] = node.name
        node.replace_input_with(source, added)
        return offset

    def extra_repr(self) -> str:
        """Settings, for printing a model."""
        return (
            f"bits={self.bits}, preset={self.preset!r}, init={self.init!r}, "
            f"per_tensor={self.per_tensor}, per_token={self.per_token}, "
            f"channel_shift={self.has_channel_shift}, cap={self.cap}, "
            f"clamp_output={self.clamp_output}, "
            f"signed={self.signed!r}, constant={self.constant}"
        )


def _is_vector(node: Node) -> bool:
    """Whether a tensor is known to have a single dimension."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dim() == 1
