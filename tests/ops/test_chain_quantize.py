"""chain_quantize: reference against its parts, kernel against reference, layouts, bad input."""

import itertools
import math

import pytest
import torch
from support import tolerances
from support.chain_cases import CHAINS, V, W, chain_arguments, same_results, views
from torch import Tensor

import qmir_ao.backend.cpu.chain_quantize  # noqa: F401  (registers the kernel)
from qmir_ao.backend.cpu.registration import KERNELS
from qmir_ao.errors import NonFiniteError
from qmir_ao.ops._activations import ACTIVATIONS
from qmir_ao.ops.chain_quantize import (
    ChainArgs,
    chain_quantize,
    chain_quantize_ref,
    chain_values,
)
from qmir_ao.ops.dls import dls_qparams, dls_qparams_ref, dls_quantize, dls_quantize_ref

SIZES = [(3, 7, 9, 11), (2, 72, 17, 5), (1, 60, 32, 33), (2, 16, 1, 1), (2, 1, 5, 7)]
STATISTICS = ["sample", "tensor", "token"]


@pytest.mark.parametrize("statistics", STATISTICS)
@pytest.mark.parametrize("chain", CHAINS)
def test_reference_equals_its_parts_in_float64(chain, statistics):
    x = torch.randn(2, 5, 7, 6).double() * 2 + 1
    args = chain_arguments(x, -1, statistics, **CHAINS[chain])
    args = ChainArgs(*(a.double() if isinstance(a, Tensor) else a for a in args))
    y = x
    if args.norm_eps is not None:
        y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
        y = y * args.norm_weight + args.norm_bias
    formulas = {
        "none": lambda t: t,
        "relu": lambda t: t.clamp(min=0),
        "sigmoid": lambda t: 1 / (1 + torch.exp(-t)),
        "silu": lambda t: t / (1 + torch.exp(-t)),
        "gelu": lambda t: t * (1 + torch.erf(t / math.sqrt(2))) / 2,
        "gelu_tanh": lambda t: (
            t * (1 + torch.tanh(math.sqrt(2 / math.pi) * (t + 0.044715 * t**3))) / 2
        ),
    }
    y = formulas[args.activation](y)
    if args.gate is not None:
        y = y * formulas[args.gate_activation](args.gate)
    y = y + args.offset.reshape(-1)
    rows = y.flatten(0, -2) if statistics == "token" else y
    step, shift = dls_qparams_ref(rows, args.scale_weights, args.shift_weights, -8, 7,
                                  statistics == "tensor", False)  # fmt: skip
    codes, got_step, got_shift = chain_quantize_ref(*args)
    torch.testing.assert_close(got_step, step, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got_shift, shift, rtol=1e-12, atol=1e-12)
    assert torch.equal(codes, dls_quantize_ref(y, step, shift, -8, 7))


@pytest.mark.parametrize("statistics", STATISTICS)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("last", [True, False], ids=["last", "first"])
def test_without_float_operators_codes_are_those_of_dls_to_the_byte(
    last, size, statistics, poisoned_empty
):
    if statistics == "token" and not last:
        return
    for (name, x), offset, grid in itertools.product(
        views(size, last).items(), (True, False), ((-8, 7), (0, 255))
    ):
        args = chain_arguments(x, -1 if last else -3, statistics, offset=offset, grid=grid)
        y = x if args.offset is None else x + args.offset
        rows = y.flatten(0, -2) if statistics == "token" else y
        step, shift = dls_qparams(rows, W, V, *grid, statistics == "tensor")
        want = dls_quantize(y, step, shift, *grid), step, shift
        assert same_results(torch.ops.qmir.chain_quantize(*args), want), name
        assert same_results(chain_quantize_ref(*args), want), name


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("last", [True, False], ids=["last", "first"])
def test_kernel_codes_equal_the_reference_but_at_boundaries(last, chain, poisoned_empty):
    seen = different = 0
    for size, statistics in itertools.product(SIZES, STATISTICS):
        if statistics == "token" and not last:
            continue
        for x in views(size, last).values():
            args = chain_arguments(x, -1 if last else -3, statistics, **CHAINS[chain])
            codes, step, shift = torch.ops.qmir.chain_quantize(*args)
            wanted, want_step, want_shift = chain_quantize_ref(*args)
            assert codes.is_contiguous() and codes.dtype == wanted.dtype
            exact = ChainArgs(*(a.double() if isinstance(a, Tensor) else a for a in args))
            _, true_step, true_shift = chain_quantize_ref(*exact)
            bound = tolerances.chain_grid(exact)
            for mine, theirs in ((step, true_step), (shift, true_shift)):
                assert ((mine - theirs).abs() <= bound).all()
            far = (codes != wanted) & ~near_boundary(args, want_step, want_shift)
            assert not far.any()
            seen, different = seen + codes.numel(), different + int((codes != wanted).sum())
    assert different <= tolerances.CODE_MISMATCH * seen


def near_boundary(args: ChainArgs, step: Tensor, shift: Tensor) -> Tensor:
    """Where the code hangs on less than the tolerance."""
    y = chain_values(args)
    rows = y.reshape(step.numel(), -1).double()
    t = (rows + shift.double()[:, None]) / step.double()[:, None]
    return (((t - t.floor()) - 0.5).abs() < tolerances.BOUNDARY_STEPS).reshape(y.shape)


@pytest.mark.parametrize("name", [n for n in ACTIVATIONS if n != "none"])
def test_activations_are_as_accurate_as_torch_in_float32(name):
    """Samples of one element: with these weights the shift is the element itself."""
    x = torch.cat([torch.linspace(-12, 12, 4001), torch.linspace(-1e-3, 1e-3, 101)]).reshape(-1, 1)
    itself = torch.tensor([0.0, 0.0, 1.0, 0.0])
    _, _, got = chain_quantize(x, torch.zeros(4), itself, activation=name)
    exact = ACTIVATIONS[name](x.double()).flatten()
    error = (got.double() - exact).abs()
    plain = (ACTIVATIONS[name](x).double().flatten() - exact).abs()
    for chunk in ((exact.abs() < 0.1), (exact.abs() >= 0.1)):
        floor = tolerances.FLOAT32_EPS * float(exact[chunk].abs().max())
        worst = max(float(plain[chunk].max()), floor)
        assert float(error[chunk].max()) <= tolerances.KERNEL_VS_REFERENCE * worst


@pytest.mark.parametrize("last", [True, False], ids=["last", "first"])
@pytest.mark.parametrize("chain", ["norm, gate", "gelu"])
def test_threads_and_repeats_and_batch_mates_do_not_matter(chain, last):
    before = torch.get_num_threads()
    for statistics in STATISTICS[: 3 if last else 2]:
        for x in views((3, 20, 33, 32), last).values():
            args = chain_arguments(x, -1 if last else -3, statistics, **CHAINS[chain])
            try:
                results = []
                for threads in (1, 2, 2, 2):
                    torch.set_num_threads(threads)
                    results.append(torch.ops.qmir.chain_quantize(*args))
            finally:
                torch.set_num_threads(before)
            assert all(same_results(results[0], other) for other in results[1:])
            if statistics == "tensor":
                continue
            gate = None if args.gate is None else args.gate[1:2]
            alone = torch.ops.qmir.chain_quantize(*args._replace(x=x[1:2], gate=gate))
            groups = results[0][1].numel() // 3
            mine = slice(groups, 2 * groups)
            whole = (results[0][0][1:2], results[0][1][mine], results[0][2][mine])
            assert same_results(alone, whole)


@pytest.mark.parametrize("last", [True, False], ids=["last", "first"])
def test_layouts_of_one_tensor_give_the_same_results(last):
    results = [
        torch.ops.qmir.chain_quantize(*chain_arguments(x, -1 if last else -3, "sample", norm=True))
        for x in views((2, 19, 9, 11), last).values()
    ]
    assert all(same_results(results[0], other) for other in results[1:])


@pytest.mark.parametrize("shape", [(2, 3, 4, 5, 6), (7, 5), (4, 6, 9), (5,)], ids=str)
def test_other_ranks(shape):
    x = torch.randn(shape)
    for dim in {-1, 1 - len(shape), -len(shape)}:
        if dim == 0:
            continue
        args = chain_arguments(x, dim, "sample", norm=x.dim() > 1, activation="relu")
        codes, step, shift = torch.ops.qmir.chain_quantize(*args)
        wanted, want_step, want_shift = chain_quantize_ref(*args)
        assert codes.shape == x.shape
        assert int((codes != wanted).sum()) == 0
        torch.testing.assert_close((step, shift), (want_step, want_shift), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(6,), (2, 1, 1, 6), (1, 3, 1, 1), (4, 1, 3, 5, 6)], ids=str)
def test_gates_broadcast(shape):
    x = torch.randn(2, 3, 5, 6)
    args = chain_arguments(x, -1, "sample")._replace(gate=torch.randn(shape))
    want = chain_quantize_ref(*args)
    assert want[0].shape == torch.broadcast_shapes(x.shape, shape)
    assert same_results(torch.ops.qmir.chain_quantize(*args), want)


@pytest.mark.parametrize("shape", [(0, 4), (2, 0), (2, 3, 0, 4)], ids=str)
def test_empty_tensor(shape):
    codes, step, _ = chain_quantize(torch.zeros(shape), W, V, activation="silu")
    assert codes.shape == shape and step.shape == shape[:1]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("chain", ["norm", "norm, gate", "silu", "gelu", "gelu_tanh"])
def test_non_finite_input_names_the_sample(chain, bad):
    for (name, x), at in itertools.product(views((3, 20, 33, 32), True).items(), (0, 17)):
        if chain == "silu" and bad == float("-inf"):
            continue  # its limit is 0 times infinity, of which torch and the kernel differ
        x = x.clone(memory_format=torch.preserve_format)
        x[1, 5, 7, at] = bad
        for statistics, where in (("sample", 1), ("token", 33 * 32 + 5 * 32 + 7)):
            args = chain_arguments(x, -1, statistics, **CHAINS[chain])
            for run in (torch.ops.qmir.chain_quantize, chain_quantize_ref):
                with pytest.raises(NonFiniteError, match=rf"sample {where} of x"):
                    run(*args)
        assert name


def test_a_bad_gate_is_noticed():
    args = chain_arguments(torch.randn(2, 3, 4), -1, "sample", gate=True, gate_activation="silu")
    args.gate[1, 2, 3] = float("nan")
    with pytest.raises(NonFiniteError, match="sample 1"):
        torch.ops.qmir.chain_quantize(*args)


@pytest.mark.parametrize("part", ["norm_weight", "norm_bias", "gate", "offset"])
def test_a_perturbed_operand_is_noticed(part):
    args = chain_arguments(torch.randn(2, 9, 11, 12), -1, "token", norm=True, gate=True)
    other = args._replace(**{part: getattr(args, part) + 0.01})
    assert not same_results(torch.ops.qmir.chain_quantize(*args), chain_quantize_ref(*other))


BAD = {
    r"dim must be -3..-1 for a tensor of rank 3, got 1": {"dim": 1},
    r"activations are none, relu, .*; got 'swish'": {"activation": "swish"},
    r"got 'tanh'": {"gate_activation": "tanh"},
    r"statistics must be .* got 'token' with dim -2": {"statistics": "token", "dim": -2},
    r"statistics must be .* got 'row'": {"statistics": "row"},
    r"norm_weight and norm_bias need norm_eps": {"norm_weight": torch.ones(5)},
    r"a norm over 5 channels got \(4,\) weights": {"norm_eps": 1e-5, "norm_bias": torch.ones(4)},
    r"offset must have 1 or 5 values, got \(3,\)": {"offset": torch.ones(3)},
    r"codes must fit 2..8 bits": {"quant_min": -300},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_are_refused(message):
    with pytest.raises(RuntimeError, match=message):
        chain_quantize(torch.randn(2, 4, 5), W, V, **BAD[message])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_run_the_reference(dtype):
    x = torch.randn(2, 5, 7).to(dtype)
    assert same_results(
        chain_quantize(x, W, V, activation="silu"),
        chain_quantize_ref(*chain_arguments(x, -1, "sample", activation="silu", offset=False)),
    )


def test_the_kernel_is_registered():
    assert "chain_quantize" in KERNELS
