"""Small models of the kinds that people write, for the tests."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import nn


class CausalSelfAttention(nn.Module):
    def __init__(self, dim, heads, dropout):
        super().__init__()
        assert dim % heads == 0
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        B, T, C = x.size()
        q, k, v = (t.view(B, T, self.heads, C // self.heads).transpose(1, 2) for t in self.qkv(x).split(C, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=self.dropout if self.training else 0)
        return self.proj(y.transpose(1, 2).contiguous().view(B, T, C))


class MLP(nn.Module):
    def __init__(self, dim, dropout=0.0):
        super().__init__()
        self.fc, self.proj, self.drop = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim), nn.Dropout(dropout)

    def forward(self, x):
        return self.drop(self.proj(F.gelu(self.fc(x))))


class Block(nn.Module):
    def __init__(self, dim, heads, dropout=0.0):
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(dim), CausalSelfAttention(dim, heads, dropout)
        self.ln_2, self.mlp = nn.LayerNorm(dim), MLP(dim, dropout)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        x = x + self.mlp(self.ln_2(x))
        return x


class GPT(nn.Module):
    """In the manner of nanoGPT: asserts, optional targets, a tuple as output."""

    def __init__(self, vocabulary=65, block_size=32, dim=32, heads=4, depth=3, dropout=0.0):
        super().__init__()
        self.block_size = block_size
        self.transformer = nn.ModuleDict(
            dict(
                wte=nn.Embedding(vocabulary, dim),
                wpe=nn.Embedding(block_size, dim),
                drop=nn.Dropout(dropout),
                h=nn.ModuleList([Block(dim, heads, dropout) for _ in range(depth)]),
                ln_f=nn.LayerNorm(dim),
            )
        )
        self.lm_head = nn.Linear(dim, vocabulary, bias=False)
        self.transformer.wte.weight = self.lm_head.weight  # tied

    def forward(self, idx, targets=None):
        device = idx.device
        b, t = idx.size()
        assert t <= self.block_size, f"Cannot forward sequence of length {t}, block size is only {self.block_size}"
        pos = torch.arange(0, t, dtype=torch.long, device=device)
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(pos))
        for block in self.transformer.h:
            x = block(x)
        x = self.transformer.ln_f(x)
        if targets is not None:
            logits = self.lm_head(x)
            loss = F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)
        else:
            logits = self.lm_head(x[:, [-1], :])
            loss = None
        return logits, loss


class Mixing(nn.Module):
    """A branch: something that is not pointwise."""

    def __init__(self, dim=8):
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(dim), nn.Linear(dim, dim)

    def forward(self, x):
        return self.fc(self.norm(x))


class Chain(nn.Module):
    """``depth`` residuals, each added by ``combine(x, f(x), i)``."""

    def __init__(self, combine, depth=3, dim=8):
        super().__init__()
        self.fs = nn.ModuleList(Mixing(dim) for _ in range(depth))
        self.combine = combine

    def forward(self, x):
        for i, f in enumerate(self.fs):
            x = self.combine(x, f(x), i)
        return x


class LucidrainsTransformer(nn.Module):
    def __init__(self, dim=16, depth=2, heads=2):
        super().__init__()
        self.cls = nn.Parameter(torch.randn(1, 1, dim))
        self.layers = nn.ModuleList(
            nn.ModuleList([LucidrainsAttention(dim, heads), nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim))])
            for _ in range(depth)
        )

    def forward(self, x, mask=None):
        tokens = repeat(self.cls, "1 1 d -> b 1 d", b=x.shape[0])
        x = torch.cat((tokens, x), dim=1)
        for attn, ff in self.layers:
            x = attn(x, mask=mask) + x
            x = ff(x) + x
        return x[:, 0]


class LucidrainsAttention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads, self.norm, self.to_qkv = heads, nn.LayerNorm(dim), nn.Linear(dim, dim * 3, bias=False)

    def forward(self, x, mask=None):
        q, k, v = (
            rearrange(t, "b n (h d) -> b h n d", h=self.heads) for t in self.to_qkv(self.norm(x)).chunk(3, dim=-1)
        )
        dots = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        if mask is not None:
            dots = dots + mask
        return rearrange(dots.softmax(-1) @ v, "b h n d -> b n (h d)")


class ParallelBlock(nn.Module):
    def __init__(self, dim=8):
        super().__init__()
        self.norm, self.attn, self.mlp = nn.LayerNorm(dim), Mixing(dim), Mixing(dim)

    def forward(self, x):
        h = self.norm(x)
        return x + self.attn(h) + self.mlp(h)


class PostNormBlock(nn.Module):
    def __init__(self, dim=8):
        super().__init__()
        self.attn, self.mlp = Mixing(dim), Mixing(dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, x):
        x = self.norm1(x + self.attn(x))
        return self.norm2(x + self.mlp(x))


class Tapped(nn.Module):
    """Collects its trunk after every block, and reads a long skip."""

    def __init__(self, dim=8):
        super().__init__()
        self.blocks = nn.ModuleList(Chain(lambda x, f, i: x + f, 2, dim) for _ in range(3))
        self.head, self.aux = nn.Linear(2 * dim, dim), nn.Linear(dim, dim)

    def forward(self, x):
        taps = []
        for block in self.blocks:
            x = block(x)
            taps.append(x)
        return {"out": self.head(torch.cat([x, taps[0]], -1)), "aux": self.aux(taps[1]), "taps": taps}


class UNet(nn.Module):
    """Residual blocks on two levels, concatenating skips, a global residual."""

    def __init__(self, dim=4):
        super().__init__()
        self.down = nn.ModuleList(ConvBlock(dim) for _ in range(2))
        self.middle = nn.ModuleList(ConvBlock(dim) for _ in range(2))
        self.up = nn.ModuleList(ConvBlock(dim) for _ in range(2))
        self.merge = nn.Conv2d(2 * dim, dim, 1)

    def forward(self, image):
        x = image
        for block in self.down:
            x = block(x)
        skip = x
        x = F.avg_pool2d(x, 2)
        for block in self.middle:
            x = block(x)
        x = F.interpolate(x, scale_factor=2, mode="nearest")
        x = self.merge(torch.cat([x, skip], 1))
        for block in self.up:
            x = block(x)
        return image + x


class ConvBlock(nn.Module):
    def __init__(self, dim=4, inplace=True):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(dim, dim, 3, padding=1, bias=False), nn.BatchNorm2d(dim)
        self.conv2, self.bn2 = nn.Conv2d(dim, dim, 3, padding=1, bias=False), nn.BatchNorm2d(dim)
        self.relu = nn.ReLU(inplace=inplace)

    def forward(self, x):
        identity = x
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += identity
        return self.relu(out)


class EDSR(nn.Module):
    def __init__(self, dim=4, depth=3):
        super().__init__()
        self.head = nn.Conv2d(3, dim, 3, padding=1)
        self.body = nn.ModuleList(
            nn.Sequential(nn.Conv2d(dim, dim, 3, padding=1), nn.ReLU(), nn.Conv2d(dim, dim, 3, padding=1))
            for _ in range(depth)
        )
        self.last = nn.Conv2d(dim, dim, 3, padding=1)
        self.tail = nn.Conv2d(dim, 3, 3, padding=1)

    def forward(self, x):
        x = self.head(x)
        res = x
        for block in self.body:
            res = res + block(res).mul(0.1)
        return self.tail(self.last(res) + x)


class SharedBlock(nn.Module):
    """One block called three times."""

    def __init__(self, dim=8):
        super().__init__()
        self.block = Block(dim, 2)

    def forward(self, x):
        for _ in range(3):
            x = self.block(x)
        return x


class NoResiduals(nn.Module):
    """Adds by the letter that are no residuals: activations, positions, masks, gates."""

    def __init__(self, dim=8):
        super().__init__()
        self.pos = nn.Parameter(torch.randn(1, 5, dim))
        self.a, self.b = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.alpha = nn.Parameter(torch.ones(dim))
        self.squeeze = nn.Linear(dim, dim)

    def forward(self, x, mask):
        x = x + self.pos
        x = 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))  # GELU
        x = x + torch.sin(self.alpha * x) ** 2 / self.alpha  # snake
        cos, sin = torch.cos(self.pos), torch.sin(self.pos)
        x1, x2 = x.chunk(2, -1)
        x = x * cos + torch.cat((-x2, x1), -1) * sin  # rotary embedding
        x = self.a(x) + self.b(x)  # a sum of two projections
        x = x + mask
        return x * torch.sigmoid(self.squeeze(x.mean(1, keepdim=True)))  # squeeze and excitation


class ViT(nn.Module):
    """Patches, a class token, pre-norm blocks."""

    def __init__(self, channels=1, dim=16, depth=3, classes=10):
        super().__init__()
        self.patch = nn.Conv2d(channels, dim, 2, 2)
        self.cls, self.pos = nn.Parameter(torch.zeros(1, 1, dim)), nn.Parameter(0.02 * torch.randn(1, 17, dim))
        layer = dict(nhead=2, dim_feedforward=2 * dim, batch_first=True, norm_first=True, dropout=0.0)
        self.blocks = nn.Sequential(*(nn.TransformerEncoderLayer(dim, **layer) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, classes)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.pos
        return self.head(self.norm(self.blocks(x))[:, 0])


class ResNet(nn.Module):
    """A stem and residual blocks with the activation after the add."""

    def __init__(self, channels=1, dim=8, depth=3, classes=10):
        super().__init__()
        self.stem = nn.Conv2d(channels, dim, 3, padding=1)
        self.blocks, self.head = nn.Sequential(*(ConvBlock(dim) for _ in range(depth))), nn.Linear(dim, classes)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean((-2, -1)))


class DenseBlock(nn.Module):
    """Convolutions that each see all before them, added with a weight (the inner block of ESRGAN, arXiv 1809.00219)."""

    def __init__(self, dim=4, growth=2, layers=3):
        super().__init__()
        widths = [growth] * (layers - 1) + [dim]
        self.layers = nn.ModuleList(nn.Conv2d(dim + i * growth, w, 3, padding=1) for i, w in enumerate(widths))

    def forward(self, x):
        seen = [x]
        for layer in self.layers:
            seen.append(F.leaky_relu(layer(torch.cat(seen, 1)), 0.2))
        return x + 0.2 * seen[-1]


class RRDB(nn.Module):
    """Residual in residual: three dense blocks, added with a weight."""

    def __init__(self, dim=4):
        super().__init__()
        self.rdb1, self.rdb2, self.rdb3 = (DenseBlock(dim) for _ in range(3))

    def forward(self, x):
        return self.rdb3(self.rdb2(self.rdb1(x))) * 0.2 + x


class ESRGAN(nn.Module):
    """A trunk of RRDBs within one add of its own."""

    def __init__(self, dim=4, depth=3):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, dim, 3, padding=1), nn.Conv2d(dim, 3, 3, padding=1)
        self.body, self.conv = nn.Sequential(*(RRDB(dim) for _ in range(depth))), nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x):
        x = self.first(x)
        return self.last(x + self.conv(self.body(x)))


class NoGrad(nn.Module):
    """x + f(x) without gradients, then x + g(x) with them."""

    def __init__(self):
        super().__init__()
        self.f, self.g = Mixing(), Mixing()

    def forward(self, x):
        with torch.no_grad():
            x = x + self.f(x)
        return x + self.g(x)
