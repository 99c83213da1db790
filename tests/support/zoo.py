"""What holds for every architecture of the zoo, as checks on a small instance of it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from qmir_ao.recipes.models import create_model

Size = tuple[int, ...]


def on_meta(name: str) -> nn.Module:
    """A model of the zoo without memory for its parameters."""
    with torch.device("meta"):
        return create_model(name)


def parameter_count(name: str) -> int:
    """Parameters of a model of the zoo."""
    return sum(p.numel() for p in on_meta(name).parameters())


def run(model: nn.Module, x: Tensor) -> Tensor:
    """Result in evaluation, without gradients."""
    with torch.no_grad():
        y: Tensor = model.eval()(x)
    return y


def with_leaves(*names: str) -> set[str]:
    """Keys of weight and bias of modules."""
    return {f"{name}.{leaf}" for name in names for leaf in ("weight", "bias")}


def export_dynamic(model: nn.Module, size: Size) -> ExportedProgram:
    """Export with dynamic batch, height and width."""
    dynamic: Any = torch.export.Dim.DYNAMIC
    shapes = ({0: dynamic, 2: dynamic, 3: dynamic},)
    return torch.export.export(model.eval(), (torch.rand(size),), dynamic_shapes=shapes)


def check_captures(model: nn.Module, size: Size, others: Sequence[Size]) -> None:
    """Assert that both captures give the bits of the model, at other sizes too."""
    exported = export_dynamic(model, size).module()
    traced = torch.fx.symbolic_trace(model)
    for other in others:
        x = torch.rand(other)
        want = run(model, x)
        with torch.no_grad():
            assert torch.equal(exported(x), want), other
        assert torch.equal(run(traced, x), want), other


def check_batch_mates(model: nn.Module, x: Tensor) -> None:
    """Assert that the result of an image does not depend on the others of its batch."""
    whole = run(model, x)
    for index in range(len(x)):
        alone = run(model, x[index : index + 1])
        # The last bits depend on how torch's convolutions split a batch.
        torch.testing.assert_close(whole[index : index + 1], alone, atol=2e-6, rtol=0)
