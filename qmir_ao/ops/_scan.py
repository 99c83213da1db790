"""A differentiable scan operator: schema, shapes and autograd, which every scan shares."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from qmir_ao.ops._library import define

OPERANDS = (
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? delta_bias, "
    "bool delta_softplus"
)
GRADIENTS = ", ".join(["Tensor"] * 7)


def define_scan(
    name: str,
    *,
    reference: Callable[..., Any],
    backward_reference: Callable[..., Any],
    check: Callable[..., None],
) -> tuple[Any, Any]:
    """Define `qmir::<name>` and `qmir::<name>_backward`, its gradient in every tensor.

    Args:
        name: stem of both operators.
        reference: of the scan; takes `OPERANDS`, returns a tensor like `u`.
        backward_reference: takes grad and `OPERANDS`, returns the gradients of the seven tensors,
            empty ones for absent operands.
        check: takes (u, delta, A, B, C), refuses shapes that do not fit together.

    Returns:
        Both operator overloads.
    """

    def fake(u: Tensor, *operands: Any) -> Tensor:
        check(u, *operands[:4])
        return u.new_empty(u.shape)

    def backward_fake(grad: Tensor, u: Tensor, *operands: Any) -> tuple[Tensor, ...]:
        tensors = (u, *operands[:-1])
        return tuple(u.new_empty(0) if x is None else x.new_empty(x.shape) for x in tensors)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.delta_softplus = inputs
        ctx.save_for_backward(*tensors)

    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        tensors = ctx.saved_tensors
        grads = backward_op(grad, *tensors, ctx.delta_softplus)
        kept = (None if x is None else g for x, g in zip(tensors, grads, strict=True))
        return (*kept, None)

    backward_op = define(
        f"{name}_backward(Tensor grad, {OPERANDS}) -> ({GRADIENTS})",
        reference=backward_reference,
        fake=backward_fake,
    )
    op = define(
        f"{name}({OPERANDS}) -> Tensor",
        reference=reference,
        fake=fake,
        backward=backward,
        setup_context=setup_context,
    )
    return op, backward_op
