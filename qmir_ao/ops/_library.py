"""The one place where `torch.ops.qmir.*` operators are defined.

`torch.library.Library` rather than the `custom_op` decorator: a call costs about 5 us instead of
20 us, and a MambaIR block makes dozens of them.
"""

from collections.abc import Callable
from typing import Any

import torch

LIBRARY = torch.library.Library("qmir", "DEF")
OPS: list[str] = []
"""Qualified names of all defined operators, in order of definition; tests iterate over it."""


def define(
    schema: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., Any] | None = None,
) -> Any:
    """Define `qmir::<name>` from its schema, reference, fake implementation and backward.

    Args:
        schema: operator schema without namespace, such as `"pack(Tensor q, int bits) -> Tensor"`.
        reference: plain-torch implementation; the default on every device and the oracle in tests.
        fake: shape implementation for tracing; reports bad arguments through `torch._check`.
        backward: autograd formula `(ctx, *grads) -> grads of the inputs`.
        setup_context: `(ctx, inputs, output)`, saves what `backward` needs.

    Returns:
        The operator overload `torch.ops.qmir.<name>.default`.
    """
    name = schema.split("(", 1)[0].strip()
    qualified = f"qmir::{name}"
    LIBRARY.define(schema)
    LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, fake, lib=LIBRARY)
    if backward is not None:
        torch.library.register_autograd(
            qualified, backward, setup_context=setup_context, lib=LIBRARY
        )
    OPS.append(qualified)
    return getattr(torch.ops.qmir, name).default
