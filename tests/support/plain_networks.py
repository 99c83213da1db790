"""Networks of plain torch that nobody designed for quantization, layers and attention first."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

CHANNELS = 6


class Framed(nn.Module):
    """A first and a last convolution, which stay in float, around a body of `CHANNELS` channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, CHANNELS, 3, padding=1)
        self.last = nn.Conv2d(CHANNELS, 3, 3, padding=1)

    def body(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.body(self.first(x)))


class EinsumAttention(Framed):
    """Attention over pixels: reshape by size, einsum, softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(CHANNELS)
        self.qkv = nn.Linear(CHANNELS, 3 * CHANNELS, bias=False)
        self.out = nn.Linear(CHANNELS, CHANNELS)

    def body(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        tokens = self.norm(x.flatten(2).transpose(1, 2))
        q, k, v = self.qkv(tokens).reshape(b, h * w, 3, 2, c // 2).permute(2, 0, 3, 1, 4)
        scores = torch.einsum("bhid,bhjd->bhij", q, k) * (c // 2) ** -0.5
        mixed = torch.einsum("bhij,bhjd->bhid", scores.softmax(dim=-1), v)
        mixed = mixed.transpose(1, 2).reshape(b, h * w, c)
        return x + self.out(mixed).transpose(1, 2).reshape(b, c, h, w)


class SkipUNet(nn.Module):
    """Two levels, skips by concatenation, sizes padded to a multiple of 4 and cropped again."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(3, 4, 3, padding=1)
        self.down = nn.ModuleList([nn.Conv2d(4, 6, 3, 2, 1), nn.Conv2d(6, 8, 3, 2, 1)])
        self.up = nn.ModuleList([nn.ConvTranspose2d(8, 6, 2, 2), nn.ConvTranspose2d(6, 4, 2, 2)])
        self.merge = nn.ModuleList([nn.Conv2d(12, 6, 1), nn.Conv2d(8, 4, 3, padding=1)])
        self.leave = nn.Conv2d(4, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[-2:]
        y = F.pad(x, (0, -w % 4, 0, -h % 4), mode="replicate")
        y = F.relu(self.enter(y))
        skips = []
        for layer in self.down:
            skips.append(y)
            y = F.leaky_relu(layer(y), 0.1)
        for up, merge in zip(self.up, self.merge, strict=True):
            y = torch.cat([up(y), skips.pop()], dim=1)
            y = F.gelu(merge(y))
        return x + self.leave(y)[..., :h, :w]


class GroupedTransposed(Framed):
    """Grouped, dilated, strided and transposed convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv2d(CHANNELS, 2 * CHANNELS, 3, padding=2, dilation=2, groups=3)
        self.down = nn.Conv2d(2 * CHANNELS, CHANNELS, (3, 2), stride=(2, 1), padding=(1, 0))
        self.up = nn.ConvTranspose2d(
            CHANNELS, CHANNELS, (3, 2), (2, 1), (1, 0), output_padding=(1, 0), groups=2
        )

    def body(self, x: Tensor) -> Tensor:
        return self.up(F.silu(self.down(F.silu(self.grouped(x)))))


class SharedTwice(Framed):
    """One block called twice, and one weight under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), nn.ReLU())
        self.again = self.block[0]
        self.point = nn.Linear(CHANNELS, CHANNELS)

    def body(self, x: Tensor) -> Tensor:
        y = self.again(self.block(self.block(x)))
        y = self.point(self.point(y.permute(0, 2, 3, 1)))
        return x + y.permute(0, 3, 1, 2)


class Checkpointed(Framed):
    """A block that trades memory for time in training."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), nn.GELU(), nn.Conv2d(CHANNELS, CHANNELS, 1)
        )

    def body(self, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(self.block, x, use_reentrant=False)
        return x + y


class ComputedWeight(Framed):
    """Functional convolutions whose weights are computed from parameters, or from the input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(CHANNELS, CHANNELS, 3, 3) / 8)
        self.scale = nn.Parameter(torch.rand(CHANNELS, 1, 1, 1) + 0.5)
        self.offset = nn.Parameter(torch.randn(CHANNELS, 1, 1, 1) / 8)
        self.standard = nn.Parameter(torch.randn(CHANNELS, CHANNELS, 1, 1))
        self.predict = nn.Linear(CHANNELS, CHANNELS)

    def body(self, x: Tensor) -> Tensor:
        y = F.relu(F.conv2d(x, self.weight * self.scale + self.offset, padding=1))
        w = self.standard
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
        y = F.relu(F.conv2d(y, w, stride=1))
        kernel = torch.softmax(self.predict(y.mean((0, 2, 3))), 0).reshape(CHANNELS, 1, 1, 1)
        return x + F.conv2d(y, kernel, groups=CHANNELS)


class PadsOdd(Framed):
    """Control flow on shapes: an odd size is padded, and cropped again at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(CHANNELS * 4, CHANNELS * 4, 1)
        self.point = nn.Linear(CHANNELS * 4, CHANNELS * 4)

    def body(self, x: Tensor) -> Tensor:
        h, w = x.shape[2], x.shape[3]
        if h % 2:
            x = F.pad(x, (0, 0, 0, 1))
        if w % 2 == 1:
            x = F.pad(x, (0, 1))
        y = self.conv(F.pixel_unshuffle(x, 2)).permute(0, 2, 3, 1)
        y = F.pixel_shuffle(self.point(y).permute(0, 3, 1, 2), 2)
        return y[:, :, :h, :w]


class TiedWeights(Framed):
    """A decoder that reads the encoder's weight, as it is and transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(CHANNELS, CHANNELS)
        self.decode = nn.Linear(CHANNELS, CHANNELS)
        self.decode.weight = self.encode.weight

    def body(self, x: Tensor) -> Tensor:
        y = self.decode(torch.tanh(self.encode(x.permute(0, 2, 3, 1))))
        y = F.linear(y, self.encode.weight.t())
        return x + y.permute(0, 3, 1, 2)


class RawParameters(Framed):
    """Parameters in plain arithmetic, in einsum and in a matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.rand(CHANNELS, 1, 1))
        self.matrix = nn.Parameter(torch.randn(CHANNELS, CHANNELS) / 3)
        self.conv = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        self.register_buffer("fixed", torch.linspace(0.5, 1.5, CHANNELS).reshape(-1, 1, 1))

    def body(self, x: Tensor) -> Tensor:
        y = torch.einsum("oi,bihw->bohw", self.matrix, x) * self.fixed
        y = (y.permute(0, 2, 3, 1) @ self.matrix).permute(0, 3, 1, 2)
        return x + self.conv(y * self.gain.exp()) * self.gain - self.matrix.mean()


class Paddings(Framed):
    """Padding by name, of even kernels too, and padding that is not zero."""

    def __init__(self) -> None:
        super().__init__()
        self.same = nn.Conv2d(CHANNELS, CHANNELS, (3, 4), padding="same", dilation=(2, 1))
        self.valid = nn.Conv2d(CHANNELS, CHANNELS, 3, padding="valid")
        self.modes = nn.ModuleDict(
            {
                mode: nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, padding_mode=mode)
                for mode in ("reflect", "replicate", "circular")
            }
        )
        self.weight = nn.Parameter(torch.randn(CHANNELS, CHANNELS, 3, 2) / 6)

    def body(self, x: Tensor) -> Tensor:
        y = self.valid(F.pad(self.same(x), (1, 1, 1, 1), mode="reflect"))
        for conv in self.modes.values():
            y = torch.tanh(conv(y))
        return x + F.conv2d(y, self.weight, padding="same")


class MultiHead(Framed):
    """torch's own attention module and attention function."""

    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(CHANNELS, 2, batch_first=True)
        self.qkv = nn.Linear(CHANNELS, 3 * CHANNELS)

    def body(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        tokens = x.reshape(b, c, h * w).permute(0, 2, 1)
        tokens = tokens + self.attend(tokens, tokens, tokens, need_weights=False)[0]
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(tokens).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return (tokens + mixed).permute(0, 2, 1).reshape(b, c, h, w)
