"""Recognise mamba-ssm's selective scan in a user's model while it is captured.

Its CUDA extension can be neither traced nor exported. During capture every reference to its
`selective_scan_fn` and `selective_scan_ref`, in modules' attributes and in imported namespaces,
points to an adapter that records `torch.ops.qmir.selective_scan`; afterwards all is put back.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from qmir_ao.errors import CaptureError
from qmir_ao.ops.selective_scan import selective_scan_op

_INTERFACE = "mamba_ssm.ops.selective_scan_interface"
_NAMES = ("selective_scan_fn", "selective_scan_ref")


def _as_groups(x: Any) -> Any:
    """(B, N, L) or (B, K, N, L) as (B, K, N, L); works on tensors and on traced proxies."""
    return x.reshape(x.shape[0], -1, x.shape[-2], x.shape[-1])


def adapter(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor:
    """Stand in for mamba-ssm's `selective_scan_fn`, of which it has the signature.

    Raises:
        CaptureError: `return_last_state=True`, which an image network never needs.
    """
    if return_last_state:
        raise CaptureError(
            "selective_scan_fn(return_last_state=True) cannot be captured; "
            "image networks read only the output: pass return_last_state=False"
        )
    y: Tensor = selective_scan_op(
        u, delta, A, _as_groups(B), _as_groups(C), D, delta_bias, delta_softplus
    )
    return y if z is None else y * F.silu(z)


def _originals() -> list[Callable[..., Any]]:
    interface = sys.modules.get(_INTERFACE)
    return [getattr(interface, name) for name in _NAMES if hasattr(interface, name)]


def _holders(model: nn.Module) -> Iterator[dict[str, Any]]:
    for module in model.modules():
        yield vars(module)
    for imported in list(sys.modules.values()):
        yield getattr(imported, "__dict__", {})


@contextlib.contextmanager
def swapped_selective_scan(model: nn.Module) -> Iterator[None]:
    """Make `model` call the adapter instead of mamba-ssm for the duration of the block."""
    originals = _originals()
    places: list[tuple[dict[str, Any], str, Any]] = []
    try:
        if originals:
            for namespace in _holders(model):
                for name, value in list(namespace.items()):
                    if any(value is original for original in originals):
                        places.append((namespace, name, value))
                        namespace[name] = adapter
        yield
    finally:
        for namespace, name, value in places:
            namespace[name] = value
