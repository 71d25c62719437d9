"""Speech models for the zoo, rebuilt small from their papers: Whisper, and a Conformer in ESPnet's manner."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TypedNorm(nn.LayerNorm):
    """A norm in its weights' precision, whose output has the input's."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype)).type(x.dtype)


class TypedLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class WhisperAttention(nn.Module):
    """Self- or cross-attention that also returns its scores where it makes them; a cache holds keys by module."""

    fused = True

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.value, self.out = (TypedLinear(dim, dim) for _ in range(3))
        self.key = TypedLinear(dim, dim, bias=False)

    def forward(
        self, x: Tensor, xa: Tensor | None = None, mask: Tensor | None = None, cache: dict | None = None
    ) -> tuple[Tensor, Tensor | None]:
        q = self.query(x)
        if cache is None or xa is None or self.key not in cache:
            source = x if xa is None else xa
            k, v = self.key(source), self.value(source)
        else:
            k, v = cache[self.key], cache[self.value]
        y, scores = self.attend(q, k, v, mask)
        return self.out(y), scores

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        _, length, dim = q.shape
        scale = (dim // self.heads) ** -0.25
        q, k, v = (t.view(*t.shape[:2], self.heads, -1).permute(0, 2, 1, 3) for t in (q, k, v))
        if WhisperAttention.fused:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=mask is not None and length > 1)
            return y.permute(0, 2, 1, 3).flatten(start_dim=2), None
        scores = (q * scale) @ (k * scale).transpose(-1, -2)
        if mask is not None:
            scores = scores + mask[:length, :length]
        weights = F.softmax(scores, dim=-1).to(q.dtype)
        return (weights @ v).permute(0, 2, 1, 3).flatten(start_dim=2), scores.detach()


class WhisperBlock(nn.Module):
    def __init__(self, dim: int, heads: int, cross: bool = False) -> None:
        super().__init__()
        self.attn, self.attn_ln = WhisperAttention(dim, heads), TypedNorm(dim)
        self.cross_attn = WhisperAttention(dim, heads) if cross else None
        self.cross_attn_ln = TypedNorm(dim) if cross else None
        self.mlp = nn.Sequential(TypedLinear(dim, 4 * dim), nn.GELU(), TypedLinear(4 * dim, dim))
        self.mlp_ln = TypedNorm(dim)

    def forward(
        self, x: Tensor, xa: Tensor | None = None, mask: Tensor | None = None, cache: dict | None = None
    ) -> Tensor:
        x = x + self.attn(self.attn_ln(x), mask=mask, cache=cache)[0]
        if self.cross_attn:
            x = x + self.cross_attn(self.cross_attn_ln(x), xa, cache=cache)[0]
        return x + self.mlp(self.mlp_ln(x))


def sinusoids(length: int, channels: int) -> Tensor:
    rates = torch.exp(-math.log(10000) / (channels // 2 - 1) * torch.arange(channels // 2))
    angles = torch.outer(torch.arange(length).float(), rates)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class WhisperEncoder(nn.Module):
    def __init__(self, mels: int, context: int, dim: int, heads: int, depth: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(mels, dim, 3, padding=1)
        self.conv2 = nn.Conv1d(dim, dim, 3, stride=2, padding=1)
        self.register_buffer("positional_embedding", sinusoids(context, dim))
        self.blocks = nn.ModuleList(WhisperBlock(dim, heads) for _ in range(depth))
        self.ln_post = TypedNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.conv2(F.gelu(self.conv1(x)))).permute(0, 2, 1)
        assert x.shape[1:] == self.positional_embedding.shape, "incorrect length of audio"
        x = (x + self.positional_embedding).to(x.dtype)
        for block in self.blocks:
            x = block(x)
        return self.ln_post(x)


class WhisperDecoder(nn.Module):
    def __init__(self, vocab: int, context: int, dim: int, heads: int, depth: int) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(vocab, dim)
        self.positional_embedding = nn.Parameter(torch.randn(context, dim) * 0.02)
        self.blocks = nn.ModuleList(WhisperBlock(dim, heads, cross=True) for _ in range(depth))
        self.ln = TypedNorm(dim)
        self.register_buffer("mask", torch.full((context, context), -torch.inf).triu_(1), persistent=False)

    def forward(self, x: Tensor, xa: Tensor, cache: dict | None = None) -> Tensor:
        offset = next(iter(cache.values())).shape[1] if cache else 0
        x = self.token_embedding(x) + self.positional_embedding[offset : offset + x.shape[-1]]
        x = x.to(xa.dtype)
        for block in self.blocks:
            x = block(x, xa, mask=self.mask, cache=cache)
        return self.ln(x) @ torch.transpose(self.token_embedding.weight.to(x.dtype), 0, 1)


class Whisper(nn.Module):
    """Speech to text (Whisper, arXiv 2212.04356), with a sparse buffer of the heads that align."""

    def __init__(self, mels=8, audio=16, vocab=50, text=12, dim=32, heads=2, depth=2) -> None:
        super().__init__()
        self.encoder = WhisperEncoder(mels, audio, dim, heads, depth)
        self.decoder = WhisperDecoder(vocab, text, dim, heads, depth)
        aligning = torch.zeros(depth, heads, dtype=torch.bool)
        aligning[depth // 2 :] = True
        self.register_buffer("alignment_heads", aligning.to_sparse(), persistent=False)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def forward(self, mel: Tensor, tokens: Tensor) -> Tensor:
        return self.decoder(tokens, self.encoder(mel))


class WhisperByHand(Whisper):
    """Whisper that makes its scores, as its timing of words does."""

    def forward(self, mel: Tensor, tokens: Tensor) -> Tensor:
        fused, WhisperAttention.fused = WhisperAttention.fused, False
        try:
            return super().forward(mel, tokens)
        finally:
            WhisperAttention.fused = fused


class RelativePositions(nn.Module):
    """Sinusoids of both signs, made when first needed and again for longer inputs; scales the input."""

    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        self.dim, self.xscale, self.dropout = dim, math.sqrt(dim), nn.Dropout(dropout)
        self.pe: Tensor | None = None

    def extend(self, x: Tensor) -> None:
        if self.pe is not None and self.pe.size(1) >= 2 * x.size(1) - 1:
            if self.pe.dtype != x.dtype or self.pe.device != x.device:
                self.pe = self.pe.to(dtype=x.dtype, device=x.device)
            return
        length = x.size(1)
        rates = torch.exp(torch.arange(0, self.dim, 2) * -(math.log(10000.0) / self.dim))
        angles = torch.outer(torch.arange(length - 1, -length, -1).float(), rates)
        self.pe = torch.stack([angles.sin(), angles.cos()], -1).flatten(1)[None].to(device=x.device, dtype=x.dtype)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.extend(x)
        middle = self.pe.size(1) // 2
        positions = self.pe[:, middle - x.size(1) + 1 : middle + x.size(1)]
        return self.dropout(x * self.xscale), self.dropout(positions)


class RelativeAttention(nn.Module):
    """Attention with relative positions (Transformer-XL, arXiv 1901.02860): two learnt biases, scores shifted."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.size = heads, dim // heads
        self.linear_q, self.linear_k, self.linear_v, self.linear_out = (nn.Linear(dim, dim) for _ in range(4))
        self.linear_pos = nn.Linear(dim, dim, bias=False)
        self.pos_bias_u, self.pos_bias_v = (nn.Parameter(torch.randn(heads, self.size) * 0.1) for _ in range(2))
        self.attn: Tensor | None = None

    def shift(self, scores: Tensor) -> Tensor:
        zeros = torch.zeros((*scores.size()[:3], 1), device=scores.device, dtype=scores.dtype)
        padded = torch.cat([zeros, scores], dim=-1).view(*scores.size()[:2], scores.size(3) + 1, scores.size(2))
        return padded[:, :, 1:].view_as(scores)[:, :, :, : scores.size(-1) // 2 + 1]

    def forward(self, query: Tensor, key: Tensor, value: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
        batch = query.size(0)
        q = self.linear_q(query).view(batch, -1, self.heads, self.size)
        k, v = (
            f(t).view(batch, -1, self.heads, self.size).transpose(1, 2)
            for f, t in ((self.linear_k, key), (self.linear_v, value))
        )
        p = self.linear_pos(positions).view(positions.size(0), -1, self.heads, self.size).transpose(1, 2)
        of_content = (q + self.pos_bias_u).transpose(1, 2) @ k.transpose(-2, -1)
        of_position = self.shift((q + self.pos_bias_v).transpose(1, 2) @ p.transpose(-2, -1))
        scores = (of_content + of_position) / math.sqrt(self.size)
        if mask is not None:
            hidden = mask.unsqueeze(1).eq(0)
            lowest = torch.finfo(scores.dtype).min
            weights = torch.softmax(scores.masked_fill(hidden, lowest), dim=-1).masked_fill(hidden, 0.0)
        else:
            weights = torch.softmax(scores, dim=-1)
        self.attn = weights.detach()  # for pictures
        y = (weights @ v).transpose(1, 2).contiguous().view(batch, -1, self.heads * self.size)
        return self.linear_out(y)


class ConformerConvolution(nn.Module):
    def __init__(self, dim: int, kernel: int) -> None:
        super().__init__()
        self.pointwise_conv1, self.pointwise_conv2 = nn.Conv1d(dim, 2 * dim, 1), nn.Conv1d(dim, dim, 1)
        self.depthwise_conv = nn.Conv1d(dim, dim, kernel, padding=kernel // 2, groups=dim)
        self.norm = nn.BatchNorm1d(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = F.glu(self.pointwise_conv1(x.transpose(1, 2)), dim=1)
        return self.pointwise_conv2(F.silu(self.norm(self.depthwise_conv(x)))).transpose(1, 2)


class ConformerLayer(nn.Module):
    """Half a feedforward, attention, convolution, half a feedforward (Conformer, arXiv 2005.08100).

    Takes and returns ``((x, positions), mask)``; in training whole layers are skipped, the others scaled up.
    """

    def __init__(self, dim: int, heads: int, kernel: int, dropout: float, drop_layers: float) -> None:
        super().__init__()
        self.self_attn, self.conv_module = RelativeAttention(dim, heads), ConformerConvolution(dim, kernel)
        self.feed_forward, self.feed_forward_macaron = (
            nn.Sequential(nn.Linear(dim, 2 * dim), nn.SiLU(), nn.Dropout(dropout), nn.Linear(2 * dim, dim))
            for _ in range(2)
        )
        self.norm_ff_macaron, self.norm_mha, self.norm_conv, self.norm_ff, self.norm_final = (
            nn.LayerNorm(dim) for _ in range(5)
        )
        self.dropout, self.ff_scale, self.drop_layers = nn.Dropout(dropout), 0.5, drop_layers

    def forward(self, x_input: tuple[Tensor, Tensor], mask: Tensor | None):
        x, positions = x_input
        skip, scale = False, 1.0
        if self.training and self.drop_layers > 0:
            skip = torch.rand(1).item() < self.drop_layers
            scale = 1.0 / (1 - self.drop_layers)
        if skip:
            return (x, positions), mask
        residual = x
        x = residual + scale * self.ff_scale * self.dropout(self.feed_forward_macaron(self.norm_ff_macaron(x)))
        residual = x
        x = self.norm_mha(x)
        x = residual + scale * self.dropout(self.self_attn(x, x, x, positions, mask))
        residual = x
        x = residual + scale * self.dropout(self.conv_module(self.norm_conv(x)))
        residual = x
        x = residual + scale * self.ff_scale * self.dropout(self.feed_forward(self.norm_ff(x)))
        return (self.norm_final(x), positions), mask


class Repeated(nn.Sequential):
    """Layers that hand several values on."""

    def forward(self, *values):
        for layer in self:
            values = layer(*values)
        return values


class Conformer(nn.Module):
    def __init__(self, mels=8, dim=32, heads=2, depth=3, kernel=5, dropout=0.1, drop_layers=0.0) -> None:
        super().__init__()
        self.first, self.embed = nn.Linear(mels, dim), RelativePositions(dim, dropout)
        self.encoders = Repeated(*(ConformerLayer(dim, heads, kernel, dropout, drop_layers) for _ in range(depth)))
        self.after_norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        mask = (torch.arange(x.size(1), device=x.device)[None] < lengths[:, None]).unsqueeze(1)
        x = self.embed(self.first(x))
        x, mask = self.encoders(x, mask)
        if isinstance(x, tuple):
            x = x[0]
        return self.after_norm(x), mask.squeeze(1).sum(1)
