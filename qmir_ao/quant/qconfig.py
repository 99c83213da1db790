"""QConfigs: which fake-quantizer, at how many bits, for activations and for weights."""

from typing import Any

from torch.ao.quantization import QConfig, QConfigMapping

from qmir_ao.errors import ConfigError
from qmir_ao.quant.fake_quant import DLSFakeQuantize
from qmir_ao.quant.patterns import SCAN
from qmir_ao.quant.rfa import RFAFakeQuantize
from qmir_ao.quant.rivals import activations, weights
from qmir_ao.quant.rivals.n2uq import N2UQFakeQuantize
from qmir_ao.quant.spec import check_bits
from qmir_ao.quant.static import StaticFakeQuantize

ACTIVATIONS: dict[str, type[Any]] = {
    "dls": DLSFakeQuantize,
    "static": StaticFakeQuantize,
    "lsq": activations.LSQFakeQuantize,
    "lsq+": activations.LSQPlusFakeQuantize,
    "pact": activations.PACTFakeQuantize,
    "pams": activations.PAMSFakeQuantize,
    "quantsr": activations.QuantSRFakeQuantize,
    "n2uq": N2UQFakeQuantize,
    "soft": activations.SoftSTEFakeQuantize,
    "ste": activations.STEFakeQuantize,
}
WEIGHTS: dict[str, type[Any]] = {
    "rfa": RFAFakeQuantize,
    "lsq": weights.LSQWeightFakeQuantize,
    "lsq+": weights.LSQPlusWeightFakeQuantize,
    "pact": weights.PACTWeightFakeQuantize,
    "pams": weights.PAMSWeightFakeQuantize,
    "quantsr": weights.QuantSRWeightFakeQuantize,
    "n2uq": weights.N2UQWeightFakeQuantize,
    "soft": weights.SoftSTEWeightFakeQuantize,
    "ste": weights.STEWeightFakeQuantize,
}
STATISTICS: dict[str, dict[str, bool]] = {
    "token": {"per_token": True, "per_tensor": False},
    "sample": {"per_token": False, "per_tensor": False},
    "tensor": {"per_token": False, "per_tensor": True},
}
PRESETS = (None, "paper", "official")


def _choose(kind: str, name: str, table: dict[str, Any]) -> Any:
    if name not in table:
        raise ConfigError(f"{kind}={name!r} is unknown; allowed: {', '.join(map(repr, table))}")
    return table[name]


def _dls_settings(activation: str, **settings: Any) -> dict[str, Any]:
    """Arguments of `DLSFakeQuantize` from those that were given."""
    given = {name: value for name, value in settings.items() if value is not None}
    if given and activation != "dls":
        raise ConfigError(f"{next(iter(given))}=... is for activation='dls', not {activation!r}")
    if "statistics" in given:
        given |= _choose("statistics", given.pop("statistics"), STATISTICS)
    return given


def get_qmir_qconfig(
    weight_bits: int = 4,
    act_bits: int = 4,
    *,
    activation: str = "dls",
    weight: str = "rfa",
    preset: str | None = None,
    init: str | None = None,
    weight_init: str | None = None,
    granularity: str | None = None,
    constants: str | None = None,
    statistics: str | None = None,
    channel_shift: bool | None = None,
    cap: bool | None = None,
    clamp_output: bool | None = None,
) -> QConfig:
    """Build a `torch.ao.quantization.QConfig` from names.

    Args:
        weight_bits: 2 to 8.
        act_bits: 2 to 8.
        activation: "dls" (dynamic, per sample), "static" (learned step and shift, as in the
            published code), or a rival: "lsq", "lsq+", "pact", "pams", "quantsr", "n2uq", "soft",
            "ste".
        weight: "rfa", or a rival of the same names. Each half is free to combine.
        preset: "official" for bit parity with the published code, "paper" for the paper's plain
            form, None for the defaults that won in this project's own evidence.
        init: initialisation of the activations: a DLS preset, or for static quantizers "lsq",
            "mse", "minmax" or "percentile"; None leaves it to the method.
        weight_init: "mse", "lsq" and for rivals "minmax" or "sigma"; None leaves it to the method.
        granularity: "per_channel" or "per_tensor" weights; None leaves it to the preset.
        constants: for static activations: "searched" puts a scan's A, D and delta bias on a
            searched grid (the default of the rivals), "own" leaves them to the method, which may
            round A to zero.
        statistics: what DLS predicts a step from: "token" (each token before linear layers, each
            sample elsewhere), "sample" or "tensor" (the whole batch); None leaves it to the preset.
        channel_shift: whether DLS learns a further shift for each channel before linear layers and
            convolutions; None leaves it to the preset.
        cap: limit DLS's step to (max - min) / 2**bits.
        clamp_output: clip what DLS returns to the input's range, off the integer grid.

    Raises:
        ConfigError: unknown bits or names, with the allowed ones.

    Source: design of torch.ao's QConfig; Q-MambaIR section 3.
    """
    if preset not in PRESETS:
        raise ConfigError(f"preset={preset!r} is unknown; allowed: None, 'paper', 'official'")
    act_kwargs: dict[str, Any] = {"bits": check_bits(act_bits)}
    weight_kwargs: dict[str, Any] = {"bits": check_bits(weight_bits)}
    act, wgt = _choose("activation", activation, ACTIVATIONS), _choose("weight", weight, WEIGHTS)
    if constants is not None and activation == "dls":
        raise ConfigError(
            "constants=... is for static activations; DLS always folds A, D and delta bias offline"
        )
    act_kwargs |= _dls_settings(
        activation,
        statistics=statistics,
        channel_shift=channel_shift,
        cap=cap,
        clamp_output=clamp_output,
    )
    for kwargs, name, value in (
        (act_kwargs, "preset", preset),
        (act_kwargs, "init", init),
        (act_kwargs, "constants", constants),
        (weight_kwargs, "preset", preset),
        (weight_kwargs, "init", weight_init),
        (weight_kwargs, "granularity", granularity),
    ):
        if value is not None:
            kwargs[name] = value
    qconfig = QConfig(activation=act.with_args(**act_kwargs), weight=wgt.with_args(**weight_kwargs))
    # Constructed once here, so that a bad combination fails at this call and not deep in prepare.
    qconfig.activation()
    qconfig.weight()
    return qconfig


qmir_qconfig = get_qmir_qconfig()
"""DLS 4-bit activations and RFA 4-bit weights."""


def official_mapping(qconfig: QConfig | QConfigMapping) -> QConfigMapping:
    """The published code's placement: DLS on scan operands and out_proj, static elsewhere.

    Raises:
        ConfigError: not a plain QConfig with DLS activations.

    Source: the architecture file of the published release.
    """
    if not isinstance(qconfig, QConfig):
        raise ConfigError(
            "placement='official' needs one QConfig, got a "
            f"{type(qconfig).__name__}; with a QConfigMapping state the placement in the mapping"
        )
    probe = qconfig.activation()
    if not isinstance(probe, DLSFakeQuantize):
        raise ConfigError(
            f"placement='official' needs DLS activations, got {type(probe).__name__}; "
            "use get_qmir_qconfig(..., activation='dls')"
        )
    quantizer: Any = StaticFakeQuantize
    static = QConfig(activation=quantizer.with_args(bits=probe.bits), weight=qconfig.weight)
    mapping = QConfigMapping().set_global(static).set_module_name_regex(r".*out_proj$", qconfig)
    for target in SCAN.targets:
        mapping.set_object_type(target, qconfig)
    return mapping
