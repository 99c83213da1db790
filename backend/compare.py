"""Prepared against lowered, operator by operator, on equal inputs.

End to end one flipped code may spread through a deep low-bit network; operator by operator the
integer arithmetic has to reproduce the fake-quantized one. The accumulators are checked against
exact float64 sums of the codes that the fake-quantizers' outputs stand for.
"""

import copy
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from qmir_ao.backend.lowered import LoweredModule
from qmir_ao.backend.report import KINDS
from qmir_ao.errors import UnsupportedGraph
from qmir_ao.ops.chain_quantize import ChainArgs
from qmir_ao.passes.chain import find_chain
from qmir_ao.passes.drop_identity import DropIdentity
from qmir_ao.passes.epilogues import own_arguments, plain_target
from qmir_ao.passes.lower import SOURCE
from qmir_ao.passes.pipeline import NORMALIZE, run_passes
from qmir_ao.quant.constants import attribute
from qmir_ao.quant.patterns import arguments, module_of
from qmir_ao.quant.prepare import is_fake_quantize

aten, qmir = torch.ops.aten, torch.ops.qmir

_BEFORE_QUANTIZE = (
    aten.add.Tensor,
    aten.mul.Tensor,
    aten.flatten.using_ints,
    aten.contiguous.default,
    aten.unsqueeze.default,
)
"""What may be done to a quantizer's input in float before it makes codes."""


BOUNDARY_STEPS = 1e-5
"""How close to a rounding boundary, in steps, a code may flip between the two forms."""


def _is_constant(argument: Any) -> bool:
    return isinstance(argument, Node) and argument.op == "get_attr"


def _is_inside(node: Node, name: str) -> bool:
    """Whether a node was emitted for the fake-quantizer `name`, between its input and its codes."""
    return node.target in _BEFORE_QUANTIZE and node.meta.get(SOURCE) == name


def _offset_of(node: Node) -> Node:
    """The channel shift that was added to the quantizer's input."""
    while node.target is not aten.add.Tensor:
        node = arguments(node)[0]
    found: Node = arguments(node)[1]
    return found


def _is_first(node: Node) -> bool:
    """Whether a node takes the fake-quantizer's own input."""
    return (
        node.target in _BEFORE_QUANTIZE
        and SOURCE in node.meta
        and not _is_inside(arguments(node)[0], node.meta[SOURCE])
    )


def compare_operators(
    prepared: GraphModule, lowered: LoweredModule, inputs: tuple[Any, ...]
) -> list[dict[str, Any]]:
    """Evaluate every integer operator on the inputs its prepared counterpart sees.

    Args:
        prepared: from `prepare_qat`.
        lowered: `convert_and_lower(prepared)`, or the same loaded from disk.
        inputs: inputs of the network.

    Returns:
        Records with `name, module, kind`; `codes` (activation codes compared), `code_mismatches`,
        of those `boundary_mismatches` within `BOUNDARY_STEPS` of a rounding boundary; `acc_equal`
        (None for a scan, whose state is float); `grid_error` (largest relative difference of a step
        or shift that float operators fused into a quantizer make); `max_error_steps` (largest
        output difference in units of the accumulator's step, on the prepared model's own grid and,
        where a boundary decides, its codes); `max_error_roundings` (the same in units of 2^-24 of
        the output's own sum of absolute terms, which is what float32 rounds; None for a scan);
        `largest_state` (what a scan gives of absolute values, in steps of u; None for others);
        `sqnr_db` against the operator in float; `clip_rate`.

    Raises:
        UnsupportedGraph: the two models do not belong together.
    """
    normalized = copy.deepcopy(prepared)
    normalized.eval()
    # Moves that cancel stand between a norm and its quantizer here, but not in the lowered graph.
    run_passes(normalized, (*NORMALIZE, DropIdentity()))
    with torch.no_grad():
        recorder = Interpreter(normalized, garbage_collect_values=False)
        recorder.run(*inputs)
        values = recorder.env
        nodes = {n.name: n for n in normalized.graph.nodes}
        records = []
        for node in lowered.graph_module.graph.nodes:
            if node.target not in KINDS:
                continue
            source = nodes.get(str(node.meta.get(SOURCE)))
            if source is None:
                raise UnsupportedGraph(
                    f"lowered node {node.name} has no counterpart in the prepared model; pass the "
                    "model that was lowered"
                )
            pair = _Operator(lowered.graph_module, node, normalized, source, values)
            try:
                records.append(pair.record())
            except (RuntimeError, StopIteration, IndexError) as error:
                raise UnsupportedGraph(
                    f"lowered node {node.name} has no counterpart in the prepared model: "
                    f"{source.name} differs "
                    f"({type(error).__name__}: {str(error)[:200]}); pass the model that was lowered"
                ) from error
    return records


def _of_groups(values: Tensor, x: Tensor) -> Tensor:
    """Steps or shifts of all, of samples or of tokens, in the rank of the tensor; float64."""
    per_group = values.numel() in (1, x.shape[0])
    return values.double().reshape((-1, *[1] * (x.dim() - 1)) if per_group else (*x.shape[:-1], 1))


class _Operator:
    """One integer operator, its prepared counterpart and the values that one saw."""

    def __init__(
        self,
        lowered: GraphModule,
        node: Node,
        prepared: GraphModule,
        source: Node,
        values: dict[Node, Any],
    ) -> None:
        self.lowered, self.node = lowered, node
        self.prepared, self.source, self.values = prepared, source, values
        self.kind = KINDS[node.target]
        self.codes = self.mismatches = self.boundary = 0
        self.clipped = self.grid_error = 0.0

    def record(self) -> dict[str, Any]:
        """All figures of this operator."""
        operands = self._integer_arguments()
        got = plain_target(self.node)(*operands)
        want = self.values[self.source].reshape(got.shape)
        difference = (got.double() - want.double()).abs()
        error = difference.max().item() if got.numel() else 0.0
        unit = self._unit(operands)
        is_scan = self.kind == "selective_scan"
        return {
            "name": self.node.name,
            "module": str(self.node.meta.get("qmir_module", "")),
            "kind": self.kind,
            "codes": self.codes,
            "code_mismatches": self.mismatches,
            "boundary_mismatches": self.boundary,
            "grid_error": self.grid_error,
            "acc_equal": None if is_scan else self._acc_equal(operands),
            "max_error_steps": error / unit if unit else 0.0,
            "max_error_roundings": None if is_scan else self._roundings(operands, difference),
            "largest_state": self._largest_state() / unit if is_scan and unit else None,
            "sqnr_db": self._sqnr(got),
            "clip_rate": self.clipped / max(self.codes, 1),
        }

    def _integer_arguments(self) -> tuple[Any, ...]:
        """Arguments of the lowered operator, with codes made from what the prepared one saw.

        Without its epilogue: a residual sum is another operator in the prepared network.
        """
        done: dict[Node, Any] = {}

        def value(node: Node) -> Any:
            if node in done:
                return done[node]
            target: Any = node.target
            if node.op == "get_attr":
                result = attribute(self.lowered, str(node.target))
            elif node.target is qmir.dls_quantize.default:
                result = self._quantize(node, value)
            elif node.target is qmir.dls_qparams.default:
                quantize = self._quantize_node_of(node)
                inside = _is_inside(arguments(node)[0], quantize.meta[SOURCE])
                x = value(arguments(node)[0]) if inside else self._seen(quantize)
                rest = [value(a) if isinstance(a, Node) else a for a in arguments(node)[1:]]
                result = target(x, *rest)
            elif node.target is qmir.chain_quantize.default:
                result = self._chain(node, value)
            elif _is_first(node):
                rest = [value(a) if isinstance(a, Node) else a for a in arguments(node)[1:]]
                result = target(self._seen(node), *rest)
            else:
                args = torch.fx.node.map_arg(arguments(node), value)
                result = target(*args, **node.kwargs)
                if node.target is aten.to.dtype and SOURCE in node.meta:
                    self._count_codes(node, result, value)
            done[node] = result
            return result

        return tuple(value(a) if isinstance(a, Node) else a for a in own_arguments(self.node))

    def _quantize_node_of(self, qparams: Node) -> Node:
        """The quantize node that uses a predicted step."""
        step = next(iter(qparams.users))
        return next(u for u in step.users if u.target is qmir.dls_quantize.default)

    def _seen(self, quantize: Node) -> Tensor:
        """What the fake-quantizer behind a quantize node got as its input."""
        fake = self._fake(quantize)
        x: Tensor = self.values[fake.all_input_nodes[0]]
        return x

    def _fake(self, quantize: Node) -> Node:
        name = quantize.meta[SOURCE]
        found: Node = next(n for n in self.prepared.graph.nodes if n.name == name)
        return found

    def _quantize(self, node: Node, value: Any) -> Tensor:
        x, fake = self._seen(node), self._fake(node)
        step, shift = value(arguments(node)[1]), value(arguments(node)[2])
        low, high = arguments(node)[3:5]
        origin, seen = arguments(node)[0], self.values[fake]
        if _is_inside(origin, node.meta[SOURCE]):
            x = value(origin)
            module: Any = module_of(self.prepared, fake)
            if getattr(module, "channel_dim", None) is not None:
                seen = seen + value(_offset_of(origin))
        codes: Tensor = qmir.dls_quantize(x, step, shift, low, high)
        return self._count(codes, x, seen, (step, shift), (low, high))

    def _chain(self, node: Node, value: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Codes, step and shift of a fused quantizer whose operands are the prepared ones."""
        fake = self._fake(node)
        args = ChainArgs(*(value(a) if _is_constant(a) else a for a in arguments(node)))
        # The statistics that its producer found are of what the lowered network saw.
        args = args._replace(moments=None, moments_channels=None)
        x, seen = self._seen(node), self.values[fake]
        if args.offset is not None:
            offset = args.offset.reshape(-1, *[1] * (-1 - args.dim))
            x, seen = x + offset, seen + offset
        rows = x.flatten(0, -2) if args.statistics == "token" else x
        limits = args.quant_min, args.quant_max
        settings = (*limits, args.statistics == "tensor", args.cap)
        grid = qmir.dls_qparams(rows, args.scale_weights, args.shift_weights, *settings)
        start, gate = self._chain_operands(fake.all_input_nodes[0], args)
        codes, step, shift = qmir.chain_quantize(*args._replace(x=start, gate=gate))
        for mine, theirs in zip((step, shift), grid, strict=True):
            if mine.numel():
                error = ((mine - theirs).abs() / (grid[0] + theirs.abs())).max()
                self.grid_error = max(self.grid_error, float(error))
        return self._count(codes, x, seen, grid, limits), *grid

    def _chain_operands(self, end: Node, args: ChainArgs) -> tuple[Tensor, Tensor | None]:
        """What the operators before a fake-quantizer that were fused into it had as operands."""
        wanted = {
            "permute": True,
            "gate": args.gate is not None,
            "activation": args.activation != "none",
            "gate_activation": args.gate_activation != "none",
            "norm": args.norm_eps is not None,
        }
        chain = find_chain(end, lambda _, role: wanted[role])
        if (chain.norm is None) != (args.norm_eps is None) or chain.activation != args.activation:
            raise UnsupportedGraph(
                f"the operators before {end.name} in the prepared model are not those that "
                f"{self.node.name} was fused from; pass the model that was lowered"
            )
        x: Tensor = self.values[chain.x]
        if chain.permute is not None:
            x = x.permute(chain.permute)
        return x, None if chain.gate is None else self.values[chain.gate]

    def _count(
        self,
        codes: Tensor,
        x: Tensor,
        seen: Tensor,
        grid: tuple[Tensor, Tensor],
        limits: tuple[int, int],
    ) -> Tensor:
        """Compare codes of x with those that stand behind a fake-quantizer's output.

        Returns the codes; where a rounding boundary made the difference, the prepared ones.
        """
        low, high = limits
        s, b = (_of_groups(t, x) for t in grid)
        expected = torch.round((seen.double() + b) / s)
        t = (x.double() + b) / s
        differs = expected != codes.double()
        near = ((t - torch.floor(t)) - 0.5).abs() < BOUNDARY_STEPS
        self.codes += codes.numel()
        self.mismatches += int(differs.sum())
        self.boundary += int((differs & near).sum())
        self.clipped += float(((t < low - 0.5) | (t > high + 0.5)).sum())
        return torch.where(differs & near, expected.to(codes.dtype), codes)

    def _count_codes(self, node: Node, codes: Tensor, value: Any) -> None:
        """Compare codes that no quantize operator made (learned thresholds) with the values seen.

        The thresholds have no rounding boundary of a uniform grid: every difference counts.
        """
        operand, user = node, next(iter(node.users))
        while user.target not in KINDS:  # a one-dimensional convolution unsqueezes its codes
            operand, user = user, next(iter(user.users))
        at = arguments(user).index(operand)
        step, shift = (value(a).double() for a in arguments(user)[at + 1 : at + 3])
        expected = torch.round((self.values[self._fake(node)].double() + shift) / step)
        self.codes += codes.numel()
        self.mismatches += int((expected != codes.double()).sum())

    def _unit(self, operands: tuple[Any, ...]) -> float:
        """Value of one accumulator unit: activation step times the largest weight step."""
        step = float(operands[1].max()) if operands[1].numel() else 1.0
        return step if self.kind == "selective_scan" else step * float(operands[4].abs().max())

    def _largest_state(self) -> float:
        """Largest result of the scan of absolute values."""
        args: Any = torch.fx.node.map_arg(arguments(self.source), lambda n: self.values[n])
        u, delta, A, B, C, D, *rest = args
        target: Any = self.source.target
        D = None if D is None else D.abs()
        largest: Tensor = target(u.abs(), delta, A, B.abs(), C.abs(), D, *rest).abs()
        return float(largest.max()) if largest.numel() else 0.0

    def _weight_grid(self, operands: tuple[Any, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """Codes of the weight that the prepared operator saw, and their step and shift."""
        weight = self.values[arguments(self.source)[1]].double()
        step, shift = (a.double().reshape(-1, *[1] * (weight.dim() - 1)) for a in operands[4:6])
        return torch.round((weight + shift) / step), step, shift

    def _products(self, operands: tuple[Any, ...], x: Tensor, weight: Tensor) -> Tensor:
        """The operator's sum of products on other operands, in float64."""
        if self.kind == "linear":
            return torch.nn.functional.linear(x, weight)
        size, stride, padding, dilation, groups = operands[9:]
        weight = weight.reshape(size)
        return torch.nn.functional.conv2d(x, weight, None, stride, padding, dilation, groups)

    def _acc_equal(self, operands: tuple[Any, ...]) -> bool:
        levels, _, _ = self._weight_grid(operands)
        if self.kind == "linear":
            got = qmir.linear_acc(operands[0], operands[3], *operands[7:9])
        else:
            got = qmir.conv2d_acc(operands[0], operands[3], *operands[8:])
        return bool((got.double() == self._products(operands, operands[0].double(), levels)).all())

    def _roundings(self, operands: tuple[Any, ...], difference: Tensor) -> float:
        """Largest difference in units of 2^-24 of all absolute terms that make up an output."""
        x_step, x_shift = (_of_groups(a, operands[0]) for a in operands[1:3])
        x = (x_step * operands[0]).abs() + x_shift.abs()
        # Where channels are shifted as well, this is what the prepared operator multiplies.
        x = torch.maximum(x, self.values[arguments(self.source)[0]].double().abs().reshape(x.shape))
        levels, step, shift = self._weight_grid(operands)
        terms = self._products(operands, x, (step * levels).abs() + shift.abs())
        bias = operands[6]
        if bias is not None:
            per_output = (-1,) if self.kind == "linear" else (-1, 1, 1)
            terms = terms + bias.double().abs().reshape(per_output)
        share = torch.where(difference > 0, difference / (2.0**-24 * terms), 0.0)
        return float(share.max()) if share.numel() else 0.0

    def _sqnr(self, got: Tensor) -> float:
        """Signal to quantization noise in dB, against the same operator on float operands."""

        def unquantized(node: Node) -> Any:
            if is_fake_quantize(module_of(self.prepared, node)):
                node = node.all_input_nodes[0]
            return self.values[node]

        args = torch.fx.node.map_arg(arguments(self.source), unquantized)
        target: Any = self.source.target
        clean: Tensor = target(*args).double().reshape(got.shape)
        noise = (got.double() - clean).square().sum()
        signal = clean.square().sum()
        return float(10 * torch.log10(signal / noise)) if noise > 0 else float("inf")
