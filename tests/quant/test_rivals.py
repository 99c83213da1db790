"""Rival quantizers against their formulas, written out in float64 without autograd."""

import math

import pytest
import torch
from support.models import ConvNet, ScanNet, train_step
from torch import Tensor

import qmir_ao
from qmir_ao.errors import ConfigError
from qmir_ao.quant.functions import interval_cuts, threshold_codes
from qmir_ao.quant.qconfig import ACTIVATIONS, WEIGHTS

RIVALS = [name for name in ACTIVATIONS if name not in ("dls", "static")]
RELATIVE = 2e-5


def _module(kind: str, bits: int, table=ACTIVATIONS, **settings):
    torch.manual_seed(bits)
    return table[kind](bits, **settings).train()


def _run(module, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    x = x.clone().requires_grad_()
    y = module(x)
    y.backward(grad)
    parameters = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    return y.detach(), x.grad, parameters


def _is_close(got: Tensor, want: Tensor) -> bool:
    scale = float(want.abs().max()) + 1e-12
    return float((got.double() - want).abs().max()) <= RELATIVE * scale


def _data(bits: int, signed: bool = True) -> tuple[Tensor, Tensor]:
    torch.manual_seed(10 + bits)
    x = torch.randn(3, 6, 40) * 1.7 + 0.3
    return (x if signed else x.abs()), torch.randn(3, 6, 40)


def _grid(x: Tensor, step: float, low: int, high: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ratio, codes and the mask of what lies inside the range."""
    ratio = x.double() / step
    return ratio, ratio.clamp(low, high).round(), (ratio >= low) & (ratio <= high)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("signed", [True, False])
def test_lsq(bits, signed):
    x, grad = _data(bits, signed)
    module = _module("lsq", bits)
    y, dx, parameters = _run(module, x, grad)
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    step = 2 * float(x.double().abs().mean()) / math.sqrt(high)
    assert float(module.step.detach()) == pytest.approx(step, rel=1e-6)
    step = float(module.step.detach())
    ratio, codes, inside = _grid(x, step, low, high)
    assert _is_close(y, step * codes)
    assert _is_close(dx, grad.double() * inside)
    scale = 1 / math.sqrt(x.numel() * high)
    want = scale * (grad.double() * (codes - torch.where(inside, ratio, 0.0))).sum()
    assert _is_close(parameters["step"], want.reshape(1))
    assert set(parameters) == {"step"}


@pytest.mark.parametrize("bits", [2, 4])
def test_lsq_plus(bits):
    x, grad = _data(bits)
    module = _module("lsq+", bits)
    y, dx, parameters = _run(module, x, grad)
    step, shift = float(module.step.detach()), float(module.shift.detach())
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    ratio, codes, inside = _grid(x.double() + shift, step, low, high)
    assert _is_close(y, step * codes - shift)
    assert _is_close(dx, grad.double() * inside)
    scale = 1 / math.sqrt(x.numel() * high)
    # The published offset is the negative of the shift: its gradient sums over clipped values.
    assert _is_close(parameters["shift"], -scale * (grad.double() * ~inside).sum().reshape(1))
    want = scale * (grad.double() * (codes - torch.where(inside, ratio, 0.0))).sum()
    assert _is_close(parameters["step"], want.reshape(1))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("signed", [True, False])
def test_pact(bits, signed):
    x, grad = _data(bits, signed)
    module = _module("pact", bits)
    with torch.no_grad():
        module(x)
        module.clip.fill_(1.25)
    y, dx, parameters = _run(module, x, grad)
    levels = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
    limit = 1.25
    clipped = x.double().clamp(-limit if signed else 0.0, limit)
    assert _is_close(y, (clipped * levels / limit).round() * limit / levels)
    inside = (x > (-limit if signed else 0.0)) & (x < limit)
    assert _is_close(dx, grad.double() * inside)
    want = (grad.double() * (x >= limit)).sum() + 1e-4 * limit
    if signed:
        want = want - (grad.double() * (x <= -limit)).sum()
    assert _is_close(parameters["clip"], want.reshape(1))


def test_published_starts_of_clipping_levels():
    x, _ = _data(4)
    for kind, want in (("pact", 10.0), ("pams", float(x.abs().amax((1, 2)).mean()))):
        module = _module(kind, 4, preset="paper")
        with torch.no_grad():
            module(x)
        assert float(module.clip.detach()) == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("bits", [2, 4])
def test_pams(bits):
    x, grad = _data(bits)
    module = _module("pams", bits)
    with torch.no_grad():
        module(x)
    assert float(module.clip.detach()) == pytest.approx(float(x.abs().max()), rel=1e-6)
    with torch.no_grad():
        module.clip.fill_(1.5)
    y, dx, parameters = _run(module, x, grad)
    limit, top = 1.5, 2 ** (bits - 1) - 1
    ratio = x.double().clamp(-limit, limit) * top / limit
    assert _is_close(y, ratio.round() * limit / top)
    inside = x.abs() < limit
    assert _is_close(dx, grad.double() * inside)
    slope = torch.where(inside, (ratio.round() - ratio) / top, torch.sign(x.double()))
    assert _is_close(parameters["clip"], (grad.double() * slope).sum().reshape(1))


@pytest.mark.parametrize("kind", ["soft", "quantsr"])
def test_soft_rounding_and_thresholds(kind):
    x, grad = _data(4)
    module = _module(kind, 4)
    module.attach({"conv"})
    with torch.no_grad():
        module(x)
    tau = torch.zeros(1, 6, 1)
    if kind == "quantsr":
        assert module.tau.shape == (1, 6, 1)
        tau = torch.linspace(-0.2, 0.3, 6).reshape(1, 6, 1)
        module.tau.data = tau.clone()
    y, dx, parameters = _run(module, x, grad)
    step = float(module.step.detach())
    ratio, codes, inside = _grid(x.double() + tau.double(), step, -8, 7)
    assert _is_close(y, step * codes)
    fraction = ratio - torch.floor(ratio) - 0.5
    slope = (1 - torch.tanh(fraction) ** 2) / (2 * math.tanh(0.5))
    want = grad.double() * slope * inside
    assert _is_close(dx, want)
    scale = 1 / math.sqrt(x.numel() * 7)
    passed = torch.where(inside, slope * ratio, 0.0)
    assert _is_close(
        parameters["step"], (scale * grad.double() * (codes - passed)).sum().reshape(1)
    )
    if kind == "quantsr":
        assert _is_close(parameters["tau"], want.sum((0, 2)).reshape(1, 6, 1))


def test_ste_learns_nothing():
    x, grad = _data(4)
    module = _module("ste", 4)
    y, dx, parameters = _run(module, x, grad)
    _, codes, inside = _grid(x, float(module.step), -8, 7)
    assert _is_close(y, float(module.step) * codes)
    assert _is_close(dx, grad.double() * inside)
    assert not parameters


def _ramp(x: Tensor, start: Tensor, widths: Tensor) -> Tensor:
    """The published surrogate: one `where` for each interval, differentiable."""
    y, edge = torch.zeros_like(x), start
    for k in range(widths.numel()):
        y = torch.where(x > edge, k + (x - edge) / widths[k], y)
        edge = edge + widths[k]
    return torch.where(x > edge, torch.full_like(x, float(widths.numel())), y)


def test_n2uq_thresholds_against_the_loop():
    torch.manual_seed(0)
    x = torch.randn(400, dtype=torch.float64, requires_grad=True)
    start = torch.tensor([-1.1], dtype=torch.float64, requires_grad=True)
    widths = (torch.rand(7, dtype=torch.float64) * 0.5 + 0.1).requires_grad_()
    grad = torch.randn_like(x)
    codes = threshold_codes(x, start, widths)
    cuts = interval_cuts(start, widths)
    assert torch.equal(codes, sum((x > cut).double() for cut in cuts))
    got = torch.autograd.grad(codes, (x, start, widths), grad)
    want = torch.autograd.grad(_ramp(x, start, widths), (x, start, widths), grad)
    for a, b in zip(got, want, strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("bits", [2, 4])
def test_n2uq_starts_on_the_searched_grid(bits):
    x, _ = _data(bits)
    reference = _module("lsq+", bits)
    with torch.no_grad():
        want, got = reference(x), _module("n2uq", bits)(x)
    step = float(reference.step)
    # Only values on a rounding boundary may take the neighbouring code.
    differs = (got - want).abs() > 1e-4 * step
    assert int(differs.sum()) <= 2 and float((got - want).abs().max()) < 1.001 * step


def _n2uq_by_hand(x, grad, scale, start, widths, step, shift, low):
    """Outputs and gradients of the module, value by value and segment by segment."""
    values, dx = [], []
    d_start, d_scale, d_step, d_widths = 0.0, 0.0, 0.0, [0.0] * len(widths)
    edges = [start + sum(widths[:k]) for k in range(len(widths) + 1)]
    for v, g in zip(x, grad, strict=True):
        q = v * scale
        code = sum(q > edge + width / 2 for edge, width in zip(edges, widths, strict=False))
        values.append(step * (code + low) - shift)
        d_step += g * (code + low)
        k = sum(q > edge for edge in edges) - 1
        inside = 0 <= k < len(widths)
        slope = g * step / widths[k] if inside else 0.0
        dx.append(slope * scale)
        d_scale += slope * v
        d_start -= slope
        if inside:
            d_widths[k] -= slope * (q - edges[k]) / widths[k]
            for earlier in range(k):
                d_widths[earlier] -= slope
    gradients = {
        "scale_in": [d_scale],
        "start_in": [d_start],
        "widths": d_widths,
        "step": [d_step],
        "shift": [-sum(grad)],
    }
    return values, dx, gradients


@pytest.mark.parametrize("bits", [2, 4])
def test_n2uq_with_unequal_intervals(bits):
    x, grad = _data(bits)
    module = _module("n2uq", bits)
    with torch.no_grad():
        module(x)
        module.widths.mul_(torch.linspace(0.6, 1.5, module.widths.numel()))
        module.scale_in.mul_(1.1)
        module.start_in.sub_(0.05)
    learned = {name: p.detach().double().tolist() for name, p in module.named_parameters()}
    y, dx, parameters = _run(module, x, grad)
    values, want, gradients = _n2uq_by_hand(
        x.double().flatten().tolist(), grad.double().flatten().tolist(),
        *(learned[name][0] for name in ("scale_in", "start_in")), learned["widths"],
        *(learned[name][0] for name in ("step", "shift")), module.quant_min,
    )  # fmt: skip
    assert _is_close(y.flatten(), torch.tensor(values, dtype=torch.float64))
    assert _is_close(dx.flatten(), torch.tensor(want, dtype=torch.float64))
    assert set(parameters) == set(gradients)
    for name, expected in gradients.items():
        assert _is_close(parameters[name], torch.tensor(expected, dtype=torch.float64)), name


def _published_start(kind: str, rows: Tensor, bits: int) -> Tensor:
    top = 2 ** (bits - 1) - 1
    if kind == "ste":
        return rows.abs().amax(1) / top
    if kind == "lsq+":
        ends = [(rows.mean(1) + sign * 3 * rows.std(1)).abs() for sign in (-1, 1)]
        return torch.maximum(*ends) / 2 ** (bits - 1)
    return 2 * rows.abs().mean(1) / math.sqrt(top)


def _rows(w: Tensor, per_channel: bool) -> Tensor:
    return w.double().reshape(w.shape[0], -1) if per_channel else w.double().reshape(1, -1)


@pytest.mark.parametrize("preset", [None, "paper"])
@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("kind", [name for name in WEIGHTS if name != "rfa"])
def test_weights(kind, bits, granularity, preset):
    torch.manual_seed(1)
    w, grad = torch.randn(5, 3, 3, 3) * 0.2, torch.randn(5, 3, 3, 3)
    module = _module(kind, bits, WEIGHTS, granularity=granularity, preset=preset)
    module.materialize(w)
    y, dw, parameters = _run(module, w, grad)
    rows, upstream = (
        _rows(w, granularity == "per_channel"),
        _rows(grad, granularity != "per_tensor"),
    )
    low, high, levels = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1, 2**bits - 1
    if kind in ("lsq", "lsq+", "ste", "soft", "quantsr"):
        step = module.step.detach().double().reshape(-1, 1)
        if preset == "paper":
            assert _is_close(step.flatten(), _published_start(kind, rows, bits))
        ratio = rows / step
        # The largest weight lies on the end of the grid, give or take the rounding of its step.
        edge = 1e-6 * high
        codes, inside = ratio.clamp(low, high).round(), (ratio >= low) & (ratio <= high + edge)
        fraction = ratio - torch.floor(ratio) - 0.5
        soft = (1 - torch.tanh(fraction) ** 2) / (2 * math.tanh(0.5))
        slope = soft if kind in ("soft", "quantsr") else torch.ones_like(ratio)
        want, gradient = step * codes, upstream * slope * inside
        if kind != "ste":
            scale = 1 / math.sqrt(rows.shape[1] * high)
            error = codes - torch.where(inside, slope * ratio, 0.0)
            assert _is_close(parameters["step"], scale * (upstream * error).sum(1))
    elif kind == "pams":
        peak = rows.abs().amax(1, keepdim=True) + 1e-8
        want, gradient = (rows * high / peak).round() * peak / high, upstream
    elif kind == "pact":
        bent = torch.tanh(rows)
        peak = bent.abs().amax(1, keepdim=True)
        reach = torch.ones_like(peak) if preset == "paper" else peak
        want = (2 * ((bent / peak * 0.5 + 0.5) * levels).round() / levels - 1) * reach
        gradient = upstream * (1 - bent**2) * reach / peak
    else:
        gamma = levels / 2 ** (bits - 1) * rows.abs().mean(1, keepdim=True)
        unit = (rows / gamma).clamp(-1, 1) * 0.5 + 0.5
        want, gradient = gamma * (2 * (unit * levels).round() / levels - 1), upstream / gamma
    assert _is_close(y.reshape(want.shape), want)
    assert _is_close(dw.reshape(want.shape), gradient)


@pytest.mark.parametrize("capture", ["fx", "export"])
@pytest.mark.parametrize("name", RIVALS)
@pytest.mark.parametrize("bits", [2, 8])
def test_every_rival_lowers_to_integers(name, bits, capture):
    torch.manual_seed(0)
    qconfig = qmir_ao.get_qmir_qconfig(bits, bits, activation=name, weight=name)
    for model, size in ((ConvNet(), (2, 3, 9, 7)), (ScanNet(), (2, 4, 11))):
        x = torch.randn(size)
        prepared = qmir_ao.prepare_qat(model, qconfig, (x,) if capture == "export" else None)
        train_step(prepared, x)
        prepared.eval()
        lowered = qmir_ao.convert_and_lower(prepared)
        records = qmir_ao.compare(prepared, lowered, x)
        assert len(records) >= 2
        for record in records:
            assert record["codes"] > 0 and record["acc_equal"] is not False
            assert record["code_mismatches"] <= record["boundary_mismatches"]
        # A flipped code upstream may move a few values; the bulk agrees.
        error = (prepared(x) - lowered(x)).abs()
        assert float((error < 1e-3).float().mean()) > 0.9


def test_lowered_rival_survives_saving(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(1, 3, 8, 8)
    for name in ("quantsr", "n2uq"):
        qconfig = qmir_ao.get_qmir_qconfig(4, 4, activation=name, weight=name)
        prepared = qmir_ao.prepare_qat(ConvNet(), qconfig)
        train_step(prepared, x)
        lowered = qmir_ao.convert_and_lower(prepared.eval())
        qmir_ao.save(lowered, tmp_path / name)
        loaded = qmir_ao.load(tmp_path / name)
        assert torch.equal(lowered(x), loaded(x))
        assert qmir_ao.compare(prepared, loaded, x) == qmir_ao.compare(prepared, lowered, x)


@pytest.mark.parametrize("name", RIVALS)
def test_parameter_operands_stay_on_their_side(name):
    """A scan's A must not reach zero from below: the state would never decay."""
    torch.manual_seed(0)
    qconfig = qmir_ao.get_qmir_qconfig(2, 2, activation=name)
    prepared = qmir_ao.prepare_qat(ScanNet(), qconfig)
    prepared(torch.randn(1, 4, 9))
    lowered = qmir_ao.convert_and_lower(prepared.eval())
    A = next(
        getattr(lowered.graph_module, n.target)
        for n in lowered.graph_module.graph.nodes
        if n.op == "get_attr" and getattr(lowered.graph_module, n.target).shape == (4, 3)
    )
    assert float(A.max()) < 0


def test_free_combination_and_errors():
    qconfig = qmir_ao.get_qmir_qconfig(2, 4, activation="lsq", weight="rfa")
    assert type(qconfig.activation()).__name__ == "LSQFakeQuantize"
    assert qconfig.weight().bits == 2
    with pytest.raises(ConfigError, match="allowed: 'dls'"):
        qmir_ao.get_qmir_qconfig(activation="lsqplus")
    with pytest.raises(ConfigError, match="allowed: 'rfa'"):
        qmir_ao.get_qmir_qconfig(weight="dls")
    with pytest.raises(ConfigError, match="init="):
        qmir_ao.get_qmir_qconfig(activation="lsq", init="mu3s")
    with pytest.raises(ConfigError, match="constants="):
        qmir_ao.get_qmir_qconfig(activation="lsq", constants="none")
    with pytest.raises(ConfigError, match="static activations"):
        qmir_ao.get_qmir_qconfig(constants="own")


def test_lowering_without_data_is_refused():
    prepared = qmir_ao.prepare_qat(ConvNet(), qmir_ao.get_qmir_qconfig(activation="lsq"))
    with pytest.raises(qmir_ao.QmirError, match="has seen no data"):
        qmir_ao.convert_and_lower(prepared.eval())


def test_learning_rate_of_n2uq_is_a_tenth():
    from qmir_ao.recipes.training_module import parameter_groups

    prepared = qmir_ao.prepare_qat(ConvNet(), qmir_ao.get_qmir_qconfig(activation="n2uq"))
    groups = {round(g["lr"], 9): g["params"] for g in parameter_groups(prepared, 1e-3)}
    assert set(groups) == {1e-3, 1e-4}
    assert len(groups[1e-3]) + len(groups[1e-4]) == len(list(prepared.parameters()))
    slow = {id(p) for p in groups[1e-4]}
    for name, parameter in prepared.named_parameters():
        assert (id(parameter) in slow) == name.endswith(
            ("scale_in", "start_in", "widths")
        ) or "activation_post_process" in name
