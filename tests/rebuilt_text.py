"""Language and series models for the zoo, rebuilt small from their papers: nanoGPT, nanochat, N-BEATS."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class NanoAttention(nn.Module):
    """Causal self-attention with one projection for all three, fused or with a mask buffer and a softmax."""

    def __init__(self, dim: int, heads: int, context: int, dropout: float, fused: bool) -> None:
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.attn_dropout, self.resid_dropout = nn.Dropout(dropout), nn.Dropout(dropout)
        self.heads, self.dropout, self.fused = heads, dropout, fused
        if not fused:
            self.register_buffer("bias", torch.ones(context, context).tril().view(1, 1, context, context))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, dim = x.size()
        q, k, v = self.c_attn(x).split(dim, dim=2)
        q, k, v = (t.view(batch, length, self.heads, dim // self.heads).transpose(1, 2) for t in (q, k, v))
        if self.fused:
            p = self.dropout if self.training else 0
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=p, is_causal=True)
        else:
            scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
            scores = scores.masked_fill(self.bias[:, :, :length, :length] == 0, float("-inf"))
            y = self.attn_dropout(F.softmax(scores, dim=-1)) @ v
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).contiguous().view(batch, length, dim)))


class NanoBlock(nn.Module):
    def __init__(self, dim: int, heads: int, context: int, dropout: float, fused: bool) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = NanoAttention(dim, heads, context, dropout, fused)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim), nn.Dropout(dropout))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class NanoGPT(nn.Module):
    """GPT-2 in nanoGPT's manner: tied embeddings, a loss where there are targets, else the last position's logits."""

    def __init__(self, vocab=50, dim=32, heads=2, depth=3, context=24, dropout=0.1, fused=True) -> None:
        super().__init__()
        self.context = context
        parts = {
            "wte": nn.Embedding(vocab, dim),
            "wpe": nn.Embedding(context, dim),
            "drop": nn.Dropout(dropout),
            "h": nn.ModuleList(NanoBlock(dim, heads, context, dropout, fused) for _ in range(depth)),
            "ln_f": nn.LayerNorm(dim),
        }
        self.transformer = nn.ModuleDict(parts)
        self.lm_head = nn.Linear(dim, vocab, bias=False)
        self.transformer.wte.weight = self.lm_head.weight
        self.apply(self._start)
        for name, weight in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * depth))

    def _start(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        length = idx.size(1)
        assert length <= self.context, f"{length} tokens, the context is {self.context}"
        positions = torch.arange(0, length, dtype=torch.long, device=idx.device)
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(positions))
        for block in self.transformer.h:
            x = block(x)
        x = self.transformer.ln_f(x)
        if targets is None:
            return self.lm_head(x[:, [-1], :]), None
        logits = self.lm_head(x)
        return logits, F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)


def rms(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[3] // 2
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos + b * sin, b * cos - a * sin], 3)


class ChatAttention(nn.Module):
    """Rotary attention with normed queries and keys, fewer key heads and, in every other layer, value embeddings."""

    def __init__(self, dim: int, heads: int, kv_heads: int, gated: bool) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.size = heads, kv_heads, dim // heads
        self.c_q = nn.Linear(dim, dim, bias=False)
        self.c_k, self.c_v = (nn.Linear(dim, kv_heads * self.size, bias=False) for _ in range(2))
        self.c_proj = nn.Linear(dim, dim, bias=False)
        self.ve_gate = nn.Linear(8, kv_heads, bias=False) if gated else None

    def forward(self, x: Tensor, values: Tensor | None, cos_sin: tuple[Tensor, Tensor]) -> Tensor:
        batch, length, _ = x.size()
        q = self.c_q(x).view(batch, length, self.heads, self.size)
        k, v = (proj(x).view(batch, length, self.kv_heads, self.size) for proj in (self.c_k, self.c_v))
        if values is not None:
            gate = 2 * torch.sigmoid(self.ve_gate(x[..., :8]))
            v = v + gate.unsqueeze(-1) * values.view(batch, length, self.kv_heads, self.size)
        q, k = rms(rotated(q, *cos_sin)), rms(rotated(k, *cos_sin))
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.heads != self.kv_heads)
        return self.c_proj(y.transpose(1, 2).contiguous().view(batch, length, -1))


class ChatMLP(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(dim, 4 * dim, bias=False), nn.Linear(4 * dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.relu(self.c_fc(x)).square())


class ChatBlock(nn.Module):
    def __init__(self, dim: int, heads: int, kv_heads: int, gated: bool) -> None:
        super().__init__()
        self.attn, self.mlp = ChatAttention(dim, heads, kv_heads, gated), ChatMLP(dim)

    def forward(self, x: Tensor, values: Tensor | None, cos_sin: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.attn(rms(x), values, cos_sin)
        return x + self.mlp(rms(x))


class NanoChat(nn.Module):
    """A GPT in nanochat's manner: before each block the trunk is mixed with its beginning; logits are capped softly."""

    def __init__(self, vocab=50, dim=32, heads=4, kv_heads=2, depth=4, context=24) -> None:
        super().__init__()
        size = dim // heads
        blocks = (ChatBlock(dim, heads, kv_heads, i % 2 == 1) for i in range(depth))
        self.transformer = nn.ModuleDict({"wte": nn.Embedding(vocab, dim), "h": nn.ModuleList(blocks)})
        self.value_embeds = nn.ModuleDict(
            {str(i): nn.Embedding(vocab, kv_heads * size) for i in range(depth) if i % 2 == 1}
        )
        self.lm_head = nn.Linear(dim, 64, bias=False)  # padded to a multiple of 64
        self.vocab = vocab
        self.resid_lambdas, self.x0_lambdas = nn.Parameter(torch.ones(depth)), nn.Parameter(torch.full((depth,), 0.1))
        angles = torch.outer(torch.arange(context).float(), 1e4 ** -(torch.arange(0, size, 2) / size))
        self.register_buffer("cos", angles.cos()[None, :, None], persistent=False)
        self.register_buffer("sin", angles.sin()[None, :, None], persistent=False)

    def forward(self, idx: Tensor, targets: Tensor | None = None, reduction: str = "mean") -> Tensor:
        length = idx.size(1)
        assert length <= self.cos.size(1), "longer than the rotary cache"
        assert idx.device == self.cos.device
        cos_sin = self.cos[:, :length], self.sin[:, :length]
        x = rms(self.transformer.wte(idx))
        x0 = x
        for i, block in enumerate(self.transformer.h):
            x = self.resid_lambdas[i] * x + self.x0_lambdas[i] * x0
            values = self.value_embeds[str(i)](idx) if str(i) in self.value_embeds else None
            x = block(x, values, cos_sin)
        logits = self.lm_head(rms(x))[..., : self.vocab]
        logits = 15 * torch.tanh(logits / 15)
        if targets is None:
            return logits
        loss = F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1, reduction=reduction)
        return loss


class NBeatsBlock(nn.Module):
    """Fully connected layers, then what the past was and what the future will be, each on a basis (section 3.1)."""

    def __init__(self, past: int, future: int, width: int, basis: str) -> None:
        super().__init__()
        sizes = [past, *[width] * 4]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False))
        self.basis = basis
        if basis == "generic":
            self.backward_basis, self.forward_basis = nn.Linear(width, past), nn.Linear(width, future)
            return
        time = torch.arange(past + future) / future
        if basis == "trend":
            basis_of_time = torch.stack([time**i for i in range(3)])
        else:
            waves = 2 * math.pi * torch.outer(torch.arange(future // 2), time)
            basis_of_time = torch.cat([waves.cos(), waves.sin()])
        self.theta = nn.Linear(width, 2 * len(basis_of_time), bias=False)
        self.register_buffer("past_basis", basis_of_time[:, :past])
        self.register_buffer("future_basis", basis_of_time[:, past:])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        for layer in self.layers:
            x = F.relu(layer(x))
        if self.basis == "generic":
            return self.backward_basis(x), self.forward_basis(x)
        back, fore = self.theta(x).chunk(2, -1)
        return back @ self.past_basis, fore @ self.future_basis


class NBeats(nn.Module):
    """Doubly residual stacks (N-BEATS, arXiv 1905.10437): blocks subtract what they explain and add to the forecast."""

    def __init__(self, past=20, future=8, width=32, stacks=("trend", "seasonality", "generic"), blocks=2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(NBeatsBlock(past, future, width, s) for s in stacks for _ in range(blocks))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        remainder = x.flip(dims=(1,))
        mask = mask.flip(dims=(1,))
        forecast = x[:, -1:]
        for block in self.blocks:
            back, fore = block(remainder)
            remainder = (remainder - back) * mask
            forecast = forecast + fore
        return forecast
