"""Statistics of each token: where they are used, what they isolate, and their integer form."""

import pytest
import torch
from support.integers import same_bytes, with_threads
from support.models import train_step
from torch import Tensor, nn

import qmir_ao
from qmir_ao.errors import ConfigError
from qmir_ao.ops.dls import dls_dequantize, dls_qparams, dls_quantize
from qmir_ao.ops.dls_fake_quant import dls_fake_quant
from qmir_ao.ops.linear import linear, linear_ref
from qmir_ao.ops.pack import pack
from qmir_ao.quant.fake_quant import DLSFakeQuantize


class Mixed(nn.Module):
    """Linear layers on tokens, and one tensor that a linear layer and a convolution share."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)
        self.alone = nn.Linear(8, 12)
        self.back = nn.Linear(12, 8)
        self.conv = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        tokens = x.flatten(2).transpose(1, 2)
        y = self.back(torch.relu(self.alone(tokens)))
        return self.last(self.conv(x) + y.transpose(1, 2).reshape(x.shape))


def _prepared(capture: str, **settings) -> torch.fx.GraphModule:
    torch.manual_seed(0)
    example = (torch.randn(1, 3, 6, 5),) if capture == "export" else None
    return qmir_ao.prepare_qat(Mixed(), qmir_ao.get_qmir_qconfig(4, 4, **settings), example)


def _tokens(prepared: torch.fx.GraphModule) -> list[bool]:
    return [m.tokens for m in prepared.modules() if isinstance(m, DLSFakeQuantize)]


@pytest.mark.parametrize("capture", ["fx", "export"])
def test_only_what_linear_layers_read_alone(capture):
    assert sorted(_tokens(_prepared(capture))) == [False, True, True]
    assert not any(_tokens(_prepared(capture, preset="paper")))


def test_is_the_operator_on_rows():
    torch.manual_seed(0)
    module, x = DLSFakeQuantize(3, channel_shift=False), torch.randn(2, 5, 16)
    module.attach({"linear"})
    got = module(x)
    settings = (module.quant_min, module.quant_max, False, False, False)
    scalars = (module.scale_weights, module.shift_weights)
    rows = torch.stack([dls_fake_quant(r[None], *scalars, *settings)[0] for r in x.flatten(0, 1)])
    assert torch.equal(got.flatten(0, 1), rows)


def test_a_token_does_not_see_its_neighbours():
    torch.manual_seed(0)
    module, x = DLSFakeQuantize(2, channel_shift=False).eval(), torch.randn(1, 6, 32)
    module.attach({"linear"})
    loud = x.clone()
    loud[0, 3] *= 1000
    kept = [0, 1, 2, 4, 5]
    assert torch.equal(module(loud)[0, kept], module(x)[0, kept])
    module.attach({"linear", "conv"})
    assert not torch.equal(module(loud)[0, kept], module(x)[0, kept])


def test_excludes_statistics_of_the_whole_batch():
    with pytest.raises(ConfigError, match="exclude each other"):
        DLSFakeQuantize(4, per_tensor=True, per_token=True)
    module = DLSFakeQuantize(4, per_tensor=True)
    module.attach({"linear"})
    assert not module.tokens


@pytest.mark.parametrize("shape", [(3, 7), (1, 1, 5), (2, 9, 64), (3, 4, 6, 33)])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_linear_with_a_step_for_each_row(shape, bits):
    torch.manual_seed(bits)
    x, weight = torch.randn(shape), torch.randint(-2, 2, (10, shape[-1]), dtype=torch.int8)
    step, shift = dls_qparams(
        x.reshape(-1, shape[-1]), torch.tensor([0.1, 0.3, 0, 0]), torch.tensor([-1.0, 0.1, 0, 0]),
        quant_min=-8, quant_max=7,
    )  # fmt: skip
    codes = dls_quantize(x, step, shift, -8, 7)
    w_step, w_shift = torch.rand(10) + 0.1, torch.randn(10)
    args = (codes, step, shift, pack(weight, bits), w_step, w_shift, torch.randn(10))
    sizes = {"bits": bits, "out_features": 10}
    y = linear(*args, **sizes)
    assert same_bytes(y, linear_ref(*args, bits, 10))
    assert same_bytes(y, with_threads(1, lambda: linear(*args, **sizes)))
    dequantized = w_step.double()[:, None] * weight.double() - w_shift.double()[:, None]
    values = dls_dequantize(codes, step, shift).double()
    want = torch.nn.functional.linear(values, dequantized, args[-1].double())
    assert float((y - want).abs().max()) <= 1e-5 * float(want.abs().max())


@pytest.mark.parametrize("capture", ["fx", "export"])
def test_lowered_equals_prepared_operator_by_operator(capture):
    prepared = _prepared(capture)
    train_step(prepared, torch.randn(2, 3, 6, 5))
    lowered = qmir_ao.convert_and_lower(prepared.eval())
    for size in ((1, 3, 6, 5), (3, 3, 9, 4)):
        records = qmir_ao.compare(prepared, lowered, torch.randn(size))
        assert sorted(r["kind"] for r in records) == ["conv2d", "linear", "linear"]
        for record in records:
            assert record["code_mismatches"] <= record["boundary_mismatches"]
            assert record["acc_equal"]
