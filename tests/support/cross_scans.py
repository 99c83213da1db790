"""Networks that read an image in four directions, as published code writes it, and near misses."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qmir_ao.capture.cross_scan import cross_merge, cross_scan

scan = torch.ops.qmir.selective_scan


class Block(nn.Module):
    """Parameters of a scan in four directions, (B, H, W, C) to (B, H, W, C); MambaIR's `SS2D`."""

    K = 4

    def __init__(self, channels: int = 5, states: int = 3, rank: int = 2) -> None:
        super().__init__()
        inner = channels + 1
        self.inner, self.rank, self.states = inner, rank, states
        self.in_proj = nn.Linear(channels, 2 * inner, bias=False)
        self.conv2d = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)
        self.act = nn.SiLU()
        self.x_proj_weight = nn.Parameter(torch.randn(self.K, rank + 2 * states, inner) * 0.4)
        self.dt_projs_weight = nn.Parameter(torch.randn(self.K, inner, rank) * 0.5)
        self.dt_projs_bias = nn.Parameter(torch.rand(self.K, inner) - 1.0)
        self.A_logs = nn.Parameter(torch.rand(self.K * inner, states))
        self.Ds = nn.Parameter(torch.ones(self.K * inner))
        self.out_norm = nn.LayerNorm(inner)
        self.out_proj = nn.Linear(inner, channels, bias=False)

    def cast(self, x: Tensor) -> Tensor:
        """To float32, as published; tests that compute in float64 replace it."""
        return x.float()

    def decay(self) -> Tensor:
        return -torch.exp(self.cast(self.A_logs)).view(-1, self.states)

    def core(self, x: Tensor) -> Tensor:
        """Sum of the directions of x (B, D, H, W), as (B, D, L)."""
        raise RuntimeError("a case defines it")

    def forward(self, x: Tensor) -> Tensor:
        b, h, w, _ = x.shape
        x, z = self.in_proj(x).chunk(2, dim=-1)
        x = self.act(self.conv2d(x.permute(0, 3, 1, 2).contiguous()))
        y = self.core(x).transpose(1, 2).contiguous().view(b, h, w, -1)
        return self.out_proj(self.out_norm(y) * F.silu(z))


class Published(Block):
    """MambaIR's `forward_core`, line by line: einsum, stack, transpose, flip, view, float."""

    def core(self, x: Tensor) -> Tensor:
        y1, y2, y3, y4 = self.forward_core(x)
        return y1 + y2 + y3 + y4

    def forward_core(self, x: Tensor) -> tuple[Tensor, ...]:
        B, _, H, W = x.shape
        L = H * W
        K = 4
        x_hwwh = torch.stack(
            [
                x.view(B, -1, L),
                torch.transpose(x, dim0=2, dim1=3).contiguous().view(B, -1, L),
            ],
            dim=1,
        ).view(B, 2, -1, L)
        xs = torch.cat([x_hwwh, torch.flip(x_hwwh, dims=[-1])], dim=1)
        x_dbl = torch.einsum("b k d l, k c d -> b k c l", xs.view(B, K, -1, L), self.x_proj_weight)
        dts, Bs, Cs = torch.split(x_dbl, [self.rank, self.states, self.states], dim=2)
        dts = torch.einsum("b k r l, k d r -> b k d l", dts.view(B, K, -1, L), self.dt_projs_weight)
        xs = self.cast(xs).view(B, -1, L)
        dts = self.cast(dts.contiguous()).view(B, -1, L)
        Bs = self.cast(Bs).view(B, K, -1, L)
        Cs = self.cast(Cs).view(B, K, -1, L)
        Ds = self.cast(self.Ds).view(-1)
        bias = self.cast(self.dt_projs_bias).view(-1)
        out_y = scan(xs, dts, self.decay(), Bs, Cs, Ds, bias, True).view(B, K, -1, L)
        inv_y = torch.flip(out_y[:, 2:4], dims=[-1]).view(B, 2, -1, L)
        wh_y = torch.transpose(out_y[:, 1].view(B, -1, W, H), dim0=2, dim1=3)
        wh_y = wh_y.contiguous().view(B, -1, L)
        invwh_y = torch.transpose(inv_y[:, 1].view(B, -1, W, H), dim0=2, dim1=3)
        invwh_y = invwh_y.contiguous().view(B, -1, L)
        return out_y[:, 0], inv_y[:, 0], wh_y, invwh_y


class Grouped(Block):
    """Projections by grouped convolutions of sequences, as VMamba has them; parts to override."""

    def read(self, x: Tensor) -> Tensor:
        """The sequences of x, (B, K, D, L)."""
        rows = x.flatten(2)
        both = torch.stack([rows, x.transpose(2, 3).flatten(2)], dim=1)
        return torch.cat([both, both.flip(-1)], dim=1)

    def merge(self, ys: Tensor, h: int, w: int) -> Tensor:
        """The sum of the directions ys (B, K, D, L), as (B, D, L)."""
        onward, back = ys.chunk(2, dim=1)
        rows, columns = (onward + back.flip(-1)).chunk(2, dim=1)
        b, _, d, _ = ys.shape
        turned = columns.reshape(b, d, w, h).transpose(2, 3)
        return rows.reshape(b, d, -1) + turned.flatten(2)

    def project(self, xs: Tensor) -> Tensor:
        """Delta, B and C of all directions before they are split, from (B, K*D, L)."""
        weight = self.x_proj_weight.reshape(-1, self.inner, 1)
        return F.conv1d(xs, weight, groups=self.K)

    def core(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        xs = self.read(x).reshape(b, self.K * self.inner, h * w)
        width = self.rank + 2 * self.states
        parts = self.project(xs).reshape(b, self.K, width, h * w)
        dts, Bs, Cs = torch.split(parts, [self.rank, self.states, self.states], dim=2)
        weight = self.dt_projs_weight.reshape(-1, self.rank, 1)
        dts = F.conv1d(dts.reshape(b, self.K * self.rank, h * w), weight, groups=self.K)
        bias = self.dt_projs_bias.reshape(-1)
        ys = scan(xs, dts, self.decay(), Bs, Cs, self.Ds, bias, True)
        return self.merge(ys.reshape(b, self.K, self.inner, h * w), h, w)


class Vmamba(Grouped):
    """Data movement of VMamba's cross scan and cross merge, as the capture records them."""

    def read(self, x: Tensor) -> Tensor:
        return cross_scan(x)

    def merge(self, ys: Tensor, h: int, w: int) -> Tensor:
        b, k, d, _ = ys.shape
        return cross_merge(ys.reshape(b, k, d, h, w))


class FourScans(Grouped):
    """A scan of its own for each direction, of its own projections, in another order."""

    def core(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        rows, columns = x.flatten(2), x.transpose(2, 3).flatten(2)
        total = 0
        for k, xs in ((2, rows.flip(-1)), (1, columns), (0, rows), (3, columns.flip(-1))):
            width, part = self.rank + 2 * self.states, slice(k * self.inner, (k + 1) * self.inner)
            weight = self.x_proj_weight[k].reshape(width, self.inner, 1)
            dts, Bs, Cs = torch.split(
                F.conv1d(xs, weight), [self.rank, self.states, self.states], dim=1
            )
            dts = F.conv1d(dts, self.dt_projs_weight[k].reshape(self.inner, self.rank, 1))
            A, D = self.decay()[part], self.Ds[part]
            Bs, Cs = Bs.unsqueeze(1), Cs.unsqueeze(1)
            y = scan(xs, dts, A, Bs, Cs, D, self.dt_projs_bias[k], True)
            y = y.flip(-1) if k > 1 else y
            y = y.reshape(b, self.inner, w, h).transpose(2, 3).flatten(2) if k % 2 else y
            total = y if k == 2 else total + y
        return total


class ChannelsLast(Grouped):
    """The image lies as (B, H, W, D) where it is read."""

    def read(self, x: Tensor) -> Tensor:
        image = x.permute(0, 2, 3, 1).contiguous()
        b, h, w, d = image.shape
        rows = image.reshape(b, h * w, d).transpose(1, 2)
        columns = image.transpose(1, 2).reshape(b, h * w, d).transpose(1, 2)
        return torch.stack([rows, columns, rows.flip(2), columns.flip(2)], dim=1)


CASES: dict[str, type[Block]] = {
    "published": Published,
    "grouped": Grouped,
    "vmamba": Vmamba,
    "four scans": FourScans,
    "channels last": ChannelsLast,
}


class OtherOrder(Grouped):
    """Rows, rows back, columns, columns back."""

    def read(self, x: Tensor) -> Tensor:
        rows, columns = x.flatten(2), x.transpose(2, 3).flatten(2)
        return torch.stack([rows, rows.flip(-1), columns, columns.flip(-1)], dim=1)

    def merge(self, ys: Tensor, h: int, w: int) -> Tensor:
        a, b, c, d = ys.unbind(1)
        return super().merge(torch.stack([a, c, b, d], dim=1), h, w)


class OtherAxis(Grouped):
    """The way back is over the channels."""

    def read(self, x: Tensor) -> Tensor:
        both = super().read(x)[:, :2]
        return torch.cat([both, both.flip(2)], dim=1)


class MissingDirection(Grouped):
    """Three directions; the columns have no way back."""

    K = 3

    def read(self, x: Tensor) -> Tensor:
        return super().read(x)[:, :3]

    def merge(self, ys: Tensor, h: int, w: int) -> Tensor:
        rows, columns, back = ys.unbind(1)
        b, d, _ = rows.shape
        return rows + back.flip(-1) + columns.reshape(b, d, w, h).transpose(2, 3).flatten(2)


class OneWay(Grouped):
    """The rows four times."""

    def read(self, x: Tensor) -> Tensor:
        return x.flatten(2).unsqueeze(1).expand(-1, 4, -1, -1)


class NotTurnedBack(Grouped):
    """The columns are added as they come."""

    def merge(self, ys: Tensor, h: int, w: int) -> Tensor:
        onward, back = ys.chunk(2, dim=1)
        return (onward + back.flip(-1)).sum(1)


class Weighted(Grouped):
    """The directions are weighted before they are added."""

    def merge(self, ys: Tensor, h: int, w: int) -> Tensor:
        return super().merge(ys * self.dt_projs_bias.unsqueeze(-1), h, w)


class Neighbours(Grouped):
    """The projections see the pixel before and after."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Parameter(torch.randn(4 * 8, 6, 3))

    def project(self, xs: Tensor) -> Tensor:
        return F.conv1d(xs, self.wide, padding=1, groups=4)


class Mixed(Grouped):
    """The projections of a direction read all directions."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Parameter(torch.randn(4 * 8, 24, 1))

    def project(self, xs: Tensor) -> Tensor:
        return F.conv1d(xs, self.wide)


class Running(Grouped):
    """The projections are summed up along the way."""

    def project(self, xs: Tensor) -> Tensor:
        return super().project(xs).cumsum(-1)


class ZeroGate(Grouped):
    """A term that depends on the place, switched off by a parameter that training will move."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(1))

    def project(self, xs: Tensor) -> Tensor:
        y = super().project(xs)
        return y + self.gate * y.cumsum(-1)


class ReadTwice(Grouped):
    """Something else reads the reordered image."""

    def read(self, x: Tensor) -> Tensor:
        self.kept = super().read(x)
        return self.kept

    def core(self, x: Tensor) -> Tensor:
        return super().core(x) + self.kept[:, 3]


class ResultReadTwice(Grouped):
    """Something else reads a direction's result."""

    def merge(self, ys: Tensor, h: int, w: int) -> Tensor:
        return super().merge(ys, h, w) + ys[:, 2]


class DeltaReadTwice(Grouped):
    """Something else reads the projections in a direction's order."""

    def project(self, xs: Tensor) -> Tensor:
        self.kept = super().project(xs)
        return self.kept

    def merge(self, ys: Tensor, h: int, w: int) -> Tensor:
        return super().merge(ys, h, w) * self.kept.mean(1, keepdim=True)


NEGATIVE: dict[str, type[Block]] = {
    "other order": OtherOrder,
    "other axis": OtherAxis,
    "missing direction": MissingDirection,
    "one way": OneWay,
    "not turned back": NotTurnedBack,
    "weighted": Weighted,
    "neighbours": Neighbours,
    "mixed": Mixed,
    "running": Running,
    "zero gate": ZeroGate,
    "read twice": ReadTwice,
    "result read twice": ResultReadTwice,
    "delta read twice": DeltaReadTwice,
}
