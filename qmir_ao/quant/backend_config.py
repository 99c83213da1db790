"""The torch.ao BackendConfig under which `prepare_qat_fx` accepts our fake-quantizers."""

import torch
from torch import nn
from torch.ao.nn import qat
from torch.ao.quantization.backend_config import (
    BackendConfig,
    BackendPatternConfig,
    DTypeConfig,
    ObservationType,
)
from torch.nn import functional as F

from qmir_ao.quant.patterns import SCAN

# The output dtype has to be int8 too, or torch.ao finds the QConfig unsupported and skips the
# operator without a word; the output quantizers it then adds are taken out again in prepare.py.
_DTYPES = DTypeConfig(
    input_dtype=torch.int8,
    output_dtype=torch.int8,
    weight_dtype=torch.int8,
    bias_dtype=torch.float,
)
_FUNCTIONS = (F.linear, F.conv1d, F.conv2d)
_MODULES = (
    (nn.Linear, qat.Linear),
    (nn.Conv1d, qat.Conv1d),
    (nn.Conv2d, qat.Conv2d),
)


def _pattern(target: object) -> BackendPatternConfig:
    return (
        BackendPatternConfig(target)
        .set_observation_type(ObservationType.OUTPUT_USE_DIFFERENT_OBSERVER_AS_INPUT)
        .set_dtype_configs([_DTYPES])
    )


def qmir_backend_config() -> BackendConfig:
    """BackendConfig with Linear, Conv1d, Conv2d, their functional forms and the selective scan."""
    config = BackendConfig("qmir")
    for root, trained in _MODULES:
        config.set_backend_pattern_config(
            _pattern(root).set_root_module(root).set_qat_module(trained)
        )
        config.set_backend_pattern_config(_pattern(trained).set_root_module(root))
    for function in _FUNCTIONS:
        config.set_backend_pattern_config(
            _pattern(function)._set_input_type_to_index({"weight": 1, "bias": 2})
        )
    for target in SCAN.targets:
        config.set_backend_pattern_config(_pattern(target))
    return config
