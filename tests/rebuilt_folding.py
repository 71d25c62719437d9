"""The Evoformer (AlphaFold 2, supplement 1.6), rebuilt small: two representations that read each other in turn."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def add(x: Tensor, y: Tensor, inplace: bool) -> Tensor:
    """Add in place where no gradient is needed, as OpenFold does."""
    if inplace:
        x += y
        return x
    return x + y


class SharedDropout(nn.Module):
    """Dropout with one mask for all rows or all columns."""

    def __init__(self, p: float, shared: int) -> None:
        super().__init__()
        self.shared, self.dropout = shared, nn.Dropout(p)

    def forward(self, x: Tensor) -> Tensor:
        shape = list(x.shape)
        shape[self.shared] = 1
        return x * self.dropout(x.new_ones(shape))


class GatedAttention(nn.Module):
    """Attention along the next-to-last axis, with a bias and a gate (algorithms 7, 8, 13)."""

    def __init__(self, dim: int, pair_dim: int | None, heads: int) -> None:
        super().__init__()
        self.heads, self.norm = heads, nn.LayerNorm(dim)
        self.norm_z = None if pair_dim is None else nn.LayerNorm(pair_dim)
        self.bias = None if pair_dim is None else nn.Linear(pair_dim, heads, bias=False)
        self.qkv, self.gate, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        x = self.norm(x)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(-2, -3) for t in self.qkv(x).chunk(3, -1))
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5  # (B, S, H, R, R)
        if z is not None:
            scores = scores + self.bias(self.norm_z(z)).permute(0, 3, 1, 2).unsqueeze(1)
        y = (scores.softmax(-1) @ v).transpose(-2, -3).flatten(-2)
        return self.out(torch.sigmoid(self.gate(x)) * y)


class TriangleAttention(nn.Module):
    """Attention around the starting or the ending node (algorithms 13 and 14)."""

    def __init__(self, dim: int, heads: int, starting: bool) -> None:
        super().__init__()
        self.starting, self.attention = starting, GatedAttention(dim, dim, heads)

    def forward(self, z: Tensor) -> Tensor:
        if not self.starting:
            z = z.transpose(-2, -3)
        y = self.attention(z, z)
        return y if self.starting else y.transpose(-2, -3)


class TriangleMultiplication(nn.Module):
    """Update by outgoing or incoming edges (algorithms 11 and 12)."""

    def __init__(self, dim: int, outgoing: bool) -> None:
        super().__init__()
        self.norm_in, self.norm_out = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.a, self.b, self.a_gate, self.b_gate, self.gate, self.out = (nn.Linear(dim, dim) for _ in range(6))
        self.equation = "bikc,bjkc->bijc" if outgoing else "bkic,bkjc->bijc"

    def forward(self, z: Tensor) -> Tensor:
        z = self.norm_in(z)
        a, b = self.a(z) * torch.sigmoid(self.a_gate(z)), self.b(z) * torch.sigmoid(self.b_gate(z))
        return self.out(self.norm_out(torch.einsum(self.equation, a, b))) * torch.sigmoid(self.gate(z))


class OuterProductMean(nn.Module):
    """What the alignment tells of pairs (algorithm 10)."""

    def __init__(self, dim: int, pair_dim: int, hidden: int = 4) -> None:
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(dim), nn.Linear(dim, hidden), nn.Linear(dim, hidden)
        self.out = nn.Linear(hidden**2, pair_dim)

    def forward(self, m: Tensor) -> Tensor:
        m = self.norm(m)
        return self.out(torch.einsum("bsic,bsjd->bijcd", self.a(m), self.b(m)).flatten(-2) / m.shape[1])


class Transition(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(self.norm(x))))


class EvoformerBlock(nn.Module):
    """Three adds to the alignment, six to the pairs (algorithm 6)."""

    def __init__(self, dim: int, pair_dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.row, self.column = GatedAttention(dim, pair_dim, heads), GatedAttention(dim, None, heads)
        self.msa_transition, self.outer = Transition(dim), OuterProductMean(dim, pair_dim)
        self.tri_mul_out, self.tri_mul_in = (TriangleMultiplication(pair_dim, o) for o in (True, False))
        self.tri_att_start, self.tri_att_end = (TriangleAttention(pair_dim, heads, s) for s in (True, False))
        self.pair_transition = Transition(pair_dim)
        self.msa_drop, self.row_drop, self.column_drop = (SharedDropout(dropout, axis) for axis in (1, 1, 2))

    def forward(self, m: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        inplace = not (self.training or torch.is_grad_enabled())
        m = add(m, self.msa_drop(self.row(m, z)), inplace)
        m = add(m, self.column(m.transpose(-2, -3)).transpose(-2, -3), inplace)
        m = add(m, self.msa_transition(m), inplace)
        z = add(z, self.outer(m), inplace)
        z = add(z, self.row_drop(self.tri_mul_out(z)), inplace)
        z = add(z, self.row_drop(self.tri_mul_in(z)), inplace)
        z = add(z, self.row_drop(self.tri_att_start(z)), inplace)
        z = add(z, self.column_drop(self.tri_att_end(z)), inplace)
        z = add(z, self.pair_transition(z), inplace)
        return m, z


class Evoformer(nn.Module):
    """Embeddings of an alignment and of its first sequence, blocks, and the single representation."""

    def __init__(self, features=6, dim=16, pair_dim=16, heads=2, depth=2, dropout=0.15) -> None:
        super().__init__()
        self.of_msa, self.of_target = nn.Linear(features, dim), nn.Linear(features, dim)
        self.left, self.right = nn.Linear(features, pair_dim), nn.Linear(features, pair_dim)
        self.blocks = nn.ModuleList(EvoformerBlock(dim, pair_dim, heads, dropout) for _ in range(depth))
        self.single = nn.Linear(dim, dim)

    def forward(self, msa: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        m = self.of_msa(msa) + self.of_target(target).unsqueeze(1)  # (B, S, R, C)
        z = self.left(target).unsqueeze(2) + self.right(target).unsqueeze(1)  # (B, R, R, C)
        for block in self.blocks:
            m, z = block(m, z)
        return m, z, self.single(m[:, 0])
