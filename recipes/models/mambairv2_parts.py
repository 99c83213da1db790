"""Parts of MambaIRv2: the attentive state-space module and the two feed-forward networks.

Shapes: B batch, H, W height and width, C channels, D inner channels, L = H*W, N states,
T routing tokens, R rank of the tokens' embedding.
"""

import math

import torch
from torch import Tensor, nn

from qmir_ao.recipes.models.grouped_scan import GroupedScan

ROUTINGS = ("gumbel", "argmax")


class SelectiveScan(GroupedScan):
    """One selective scan over a sequence, with a prompt added to its output matrix.

    Args:
        inner: D.
        d_state: N.

    Shape:
        input (B, D, L) and prompt (B, 1, N, L), output (B, D, L).
    """

    def __init__(self, inner: int, d_state: int) -> None:
        super().__init__()
        self.add_scan(1, inner, math.ceil(inner / 16), d_state)

    def forward(self, x: Tensor, prompt: Tensor) -> Tensor:
        """Scan; see the class for shapes."""
        b, _, length = x.shape
        return self.scan_sequences(x, b, length, prompt)


def one_hot_policy(logits: Tensor, noisy: bool) -> tuple[Tensor, Tensor]:
    """Route every pixel to one token, with the gradient of a softmax.

    Args:
        logits: (B, L, T).
        noisy: add Gumbel noise, which samples the token instead of taking the likeliest.

    Returns:
        The choice as one-hot vectors (B, L, T) and as indices (B, L).
    """
    if noisy:
        logits = logits - torch.empty_like(logits).exponential_().log()
    soft = logits.softmax(-1)
    chosen = logits.argmax(-1)
    hard = torch.zeros_like(soft).scatter(2, chosen.unsqueeze(2), 1.0)
    # In this order the difference is an exact zero: the values are those of `hard`.
    return hard + (soft - soft.detach()), chosen


class ASSM(nn.Module):
    """Attentive state-space module: a scan over the pixels sorted by the token they are routed to.

    Args:
        channels: C.
        d_state: N.
        tokens: T.
        rank: R.
        expand: D is `int(expand * C)`.
        routing: "gumbel" (the choice is sampled while training, as published) or "argmax". In
            evaluation and in a symbolic trace it is always the argmax.

    Shape:
        input (B, H, W, C) and the layer's embedding (R, N), output (B, H, W, C).

    Source: Guo et al. 2024, section 3.2; parameter names and shapes are the published ones.
    """

    def __init__(
        self, channels: int, d_state: int, tokens: int, rank: int, expand: float, routing: str
    ) -> None:
        super().__init__()
        inner = int(channels * expand)
        self.channels, self.inner, self.routing = channels, inner, routing
        self.selectiveScan = SelectiveScan(inner, d_state)
        self.out_norm = nn.LayerNorm(inner)
        self.out_proj = nn.Linear(inner, channels)
        self.in_proj = nn.Sequential(nn.Conv2d(channels, inner, 1))
        self.CPE = nn.Sequential(nn.Conv2d(inner, inner, 3, padding=1, groups=inner))
        self.embeddingB = nn.Embedding(tokens, rank)
        nn.init.uniform_(self.embeddingB.weight, -1 / tokens, 1 / tokens)
        self.route = nn.Sequential(
            nn.Linear(channels, channels // 3), nn.GELU(), nn.Linear(channels // 3, tokens)
        )

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Run the module; see the class for shapes."""
        b, h, w, c = x.shape
        # Noise in a captured graph would stay there in evaluation.
        traced = isinstance(x, torch.fx.Proxy)
        noisy = self.training and self.routing == "gumbel" and not traced
        policy, chosen = one_hot_policy(self.route(x).flatten(1, 2), noisy)
        prompt = torch.matmul(policy, torch.matmul(self.embeddingB.weight, embedding))
        order = torch.argsort(chosen, dim=1, stable=True)
        y = self.in_proj(x.permute(0, 3, 1, 2))
        y = (y * torch.sigmoid(self.CPE(y))).flatten(2)
        y = torch.gather(y, 2, order.unsqueeze(1).expand(-1, self.inner, -1))
        y = self.selectiveScan(y, prompt.transpose(1, 2).unsqueeze(1))
        y = self.out_proj(self.out_norm(y.transpose(1, 2)))
        index = order.unsqueeze(2).expand(-1, -1, self.channels)
        return torch.zeros_like(y).scatter(1, index, y).reshape(b, h, w, c)


class DepthwiseConv(nn.Module):
    """Depthwise 5x5 convolution and GELU under the published name: (B, C, H, W) -> same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        conv = nn.Conv2d(channels, channels, 5, padding=2, groups=channels)
        self.depthwise_conv = nn.Sequential(conv, nn.GELU())

    def forward(self, x: Tensor) -> Tensor:
        """Convolve."""
        y: Tensor = self.depthwise_conv(x)
        return y


class ConvFFN(nn.Module):
    """Feed-forward network with a residual depthwise convolution: (B, H, W, C) -> same."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, hidden)
        self.act = nn.GELU()
        self.dwconv = DepthwiseConv(hidden)
        self.fc2 = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Run the network."""
        y = self.act(self.fc1(x))
        y = y + self.dwconv(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        out: Tensor = self.fc2(y)
        return out


class Gate(nn.Module):
    """One half of the channels times the convolved other half: (B, H, W, 2C) -> (B, H, W, C)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.conv = nn.Conv2d(channels, channels, 5, padding=2, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        """Gate."""
        value, gate = x.chunk(2, dim=-1)
        gate = self.conv(self.norm(gate).permute(0, 3, 1, 2))
        out: Tensor = value * gate.permute(0, 2, 3, 1)
        return out


class GatedMLP(nn.Module):
    """Feed-forward network with a gate, of the light variant: (B, H, W, C) -> same."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, hidden)
        self.act = nn.GELU()
        self.sg = Gate(hidden // 2)
        self.fc2 = nn.Linear(hidden // 2, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Run the network."""
        y: Tensor = self.fc2(self.sg(self.act(self.fc1(x))))
        return y
