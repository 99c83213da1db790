"""Which channels a view holds: against the same views of a tensor of channel numbers."""

from collections.abc import Callable

import pytest
import torch
from support.graphs import captured
from support.models import CAPTURES
from torch import Tensor, nn

from qmir_ao.passes.channel_map import CHANNELS, follow, path_from, whole
from qmir_ao.passes.sizes import known_sizes

Views = Callable[[Tensor], Tensor]
IMAGE: dict[str, Views] = {
    "itself": lambda y: y.contiguous(),
    "half": lambda y: y.chunk(2, 1)[1],
    "pieces": lambda y: y.split([3, 7, 2], 1)[1],
    "equal pieces": lambda y: y.split(5, 1)[2],
    "negative dimension": lambda y: y.split([3, 7, 2], -3)[2],
    "channels last": lambda y: y.permute(0, 2, 3, 1).chunk(3, -1)[0].permute(0, 3, 1, 2),
    "sequence": lambda y: y.flatten(2).transpose(1, 2)[:, :, :4],
    "directions": lambda y: y.reshape(y.shape[0], 4, 3, y.shape[2], y.shape[3]).split([1, 2], 2)[1],
    "one direction": lambda y: y.reshape(y.shape[0], 4, 3, y.shape[2], y.shape[3]).select(1, 2),
    "merged": lambda y: (
        y.reshape(y.shape[0], 4, 3, y.shape[2], y.shape[3])
        .split([1, 2], 2)[1]
        .reshape(y.shape[0], 8, y.shape[2], y.shape[3])
    ),
    "swapped": lambda y: (
        y.reshape(y.shape[0], 4, 3, y.shape[2], y.shape[3]).transpose(1, 2).flatten(1, 2)
    ),
    "one line": lambda y: y[:, 3:9].flatten(2).unsqueeze(2).squeeze(2),
    "narrowed": lambda y: y.narrow(1, 2, 5),
}
NOT: dict[str, Views] = {
    "part of the image": lambda y: y[:, :, 1:],
    "pieces of the image": lambda y: y.chunk(2, 2)[0],
    "samples together": lambda y: y.reshape(y.shape[0] * 12, y.shape[2], y.shape[3]),
    "samples later": lambda y: y.permute(1, 0, 2, 3),
    "channels with pixels": lambda y: y.reshape(y.shape[0], 6, -1),
    "all in one": lambda y: y.flatten(1),
    "before the samples": lambda y: y.unsqueeze(0),
    "turned": lambda y: y.flip(2),
}


class Viewed(nn.Module):
    """A convolution, a view of its result, and one more operator that ends it."""

    def __init__(self, views: Views) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 12, 1)
        self.views = views

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.views(self.conv(x)))


def found(views: Views, capture: str):
    graph = captured(Viewed(views), capture, 2, 2, 6, 5)
    end = next(n for n in graph.graph.nodes if "tanh" in str(n.target))
    made = path_from(lambda n: "conv" in str(n.target), end.args[0])
    if made is None:
        return None
    return follow(made[1], whole(4, 1, 12), known_sizes(graph))


@pytest.mark.parametrize("capture", CAPTURES)
@pytest.mark.parametrize("name", IMAGE)
def test_views_are_followed(name: str, capture: str) -> None:
    view = found(IMAGE[name], capture)
    numbers = torch.arange(12).reshape(1, 12, 1, 1).expand(2, 12, 6, 5)
    want = IMAGE[name](numbers)
    assert len(view.dims) == want.dim()
    assert want.numel() == 2 * view.channels.numel() * 30
    for dim in range(want.dim()):
        if view.axis(dim) is not None:
            assert view.channels.shape[view.axis(dim)] == want.shape[dim]
    kept = [0 if kind != CHANNELS else slice(None) for kind in view.dims]
    assert torch.equal(want[tuple(kept)], view.channels)


@pytest.mark.parametrize("capture", CAPTURES)
@pytest.mark.parametrize("name", NOT)
def test_other_views_are_not(name: str, capture: str) -> None:
    assert found(NOT[name], capture) is None
