"""Models of images for the zoo, rebuilt small from their papers: DINOv2, and CLIP with its two towers."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LayerScale(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class DropPath(nn.Module):
    """Zero the branch of some samples in training and scale that of the others (arXiv 1603.09382)."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if self.p == 0.0 or not self.training:
            return x
        keep = 1 - self.p
        kept = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep)
        if keep > 0.0:
            kept.div_(keep)
        return x * kept


def add_to_some(x: Tensor, branch: Callable[[Tensor], Tensor], p: float) -> Tensor:
    """Return x, with the branch of a random subset of the samples added and scaled up (DINOv2, section 5)."""
    batch = x.shape[0]
    size = max(int(batch * (1 - p)), 1)
    rows = torch.randperm(batch, device=x.device)[:size]
    added = branch(x[rows]).flatten(1)
    return torch.index_add(x.flatten(1), 0, rows, added.to(dtype=x.dtype), alpha=batch / size).view_as(x)


class DinoAttention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, dim = x.shape
        q, k, v = torch.unbind(self.qkv(x).reshape(batch, length, 3, self.heads, dim // self.heads), 2)
        y = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)))
        return self.proj(y.transpose(1, 2).reshape(batch, length, dim))


class DinoBlock(nn.Module):
    """Computes branches on a subset of the batch where more than a tenth is dropped, else zeroes them."""

    def __init__(self, dim: int, heads: int, drop: float) -> None:
        super().__init__()
        self.norm1, self.attn, self.ls1 = nn.LayerNorm(dim), DinoAttention(dim, heads), LayerScale(dim)
        self.norm2, self.ls2 = nn.LayerNorm(dim), LayerScale(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.drop_path1, self.drop_path2, self.drop = DropPath(drop), DropPath(drop), drop

    def forward(self, x: Tensor) -> Tensor:
        def attn(x: Tensor) -> Tensor:
            return self.ls1(self.attn(self.norm1(x)))

        def ffn(x: Tensor) -> Tensor:
            return self.ls2(self.mlp(self.norm2(x)))

        if self.training and self.drop > 0.1:
            x = add_to_some(x, branch=attn, p=self.drop)
            x = add_to_some(x, branch=ffn, p=self.drop)
        elif self.training and self.drop > 0.0:
            x = x + self.drop_path1(attn(x))
            x = x + self.drop_path2(ffn(x))
        else:
            x = x + attn(x)
            x = x + ffn(x)
        return x


class DinoV2(nn.Module):
    """A ViT with register tokens, masked patches and stochastic depth (DINOv2, arXiv 2304.07193)."""

    def __init__(self, dim=32, heads=2, depth=3, drop=0.0, size=32, patch=8, registers=2) -> None:
        super().__init__()
        self.patch_embed, self.side = nn.Conv2d(3, dim, patch, patch), size // patch
        self.cls_token, self.mask_token = nn.Parameter(torch.randn(1, 1, dim)), nn.Parameter(torch.randn(1, dim))
        self.register_tokens = nn.Parameter(torch.randn(1, registers, dim))
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + self.side**2, dim))
        self.blocks, self.norm = nn.ModuleList(DinoBlock(dim, heads, drop) for _ in range(depth)), nn.LayerNorm(dim)
        self.registers, self.head = registers, nn.Identity()

    def positions(self, x: Tensor, width: int, height: int) -> Tensor:
        if x.shape[1] == self.pos_embed.shape[1] and width == height:
            return self.pos_embed
        own, patches = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        patches = patches.reshape(1, self.side, self.side, -1).permute(0, 3, 1, 2)
        size = (width // self.patch_embed.stride[0], height // self.patch_embed.stride[1])
        patches = F.interpolate(patches, size=size, mode="bicubic", antialias=False)
        return torch.cat([own, patches.permute(0, 2, 3, 1).view(1, -1, x.shape[-1])], dim=1)

    def prepare_tokens(self, x: Tensor, masks: Tensor | None) -> Tensor:
        _, _, width, height = x.shape
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        if masks is not None:
            x = torch.where(masks.unsqueeze(-1), self.mask_token.to(x.dtype).unsqueeze(0), x)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        x = x + self.positions(x, width, height)
        return torch.cat([x[:, :1], self.register_tokens.expand(x.shape[0], -1, -1), x[:, 1:]], dim=1)

    def forward_features(self, x: Tensor, masks: Tensor | None = None) -> dict[str, Tensor]:
        x = self.prepare_tokens(x, masks)
        for block in self.blocks:
            x = block(x)
        normed, first = self.norm(x), 1 + self.registers
        return {"cls": normed[:, 0], "registers": normed[:, 1:first], "patches": normed[:, first:], "prenorm": x}

    def get_intermediate_layers(self, x: Tensor, n: int = 1) -> tuple[Tensor, ...]:
        x, outputs = self.prepare_tokens(x, None), []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i >= len(self.blocks) - n:
                outputs.append(x)
        return tuple(self.norm(out)[:, 1 + self.registers :] for out in outputs)

    def forward(self, x: Tensor, masks: Tensor | None = None, is_training: bool = True) -> dict[str, Tensor] | Tensor:
        features = self.forward_features(x, masks)
        return features if is_training else self.head(features["cls"])


class QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class ClipBlock(nn.Module):
    def __init__(self, dim: int, heads: int, mask: Tensor | None = None) -> None:
        super().__init__()
        self.attn, self.ln_1, self.ln_2 = nn.MultiheadAttention(dim, heads), nn.LayerNorm(dim), nn.LayerNorm(dim)
        parts = [("c_fc", nn.Linear(dim, 4 * dim)), ("gelu", QuickGELU()), ("c_proj", nn.Linear(4 * dim, dim))]
        self.mlp = nn.Sequential(OrderedDict(parts))
        self.attn_mask = mask  # a plain attribute

    def attention(self, x: Tensor) -> Tensor:
        self.attn_mask = self.attn_mask.to(dtype=x.dtype, device=x.device) if self.attn_mask is not None else None
        return self.attn(x, x, x, need_weights=False, attn_mask=self.attn_mask)[0]

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class ClipVision(nn.Module):
    def __init__(self, dim: int, heads: int, depth: int, width: int, size: int, patch: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, dim, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(dim) * dim**-0.5)
        self.positional_embedding = nn.Parameter(torch.randn((size // patch) ** 2 + 1, dim) * dim**-0.5)
        self.ln_pre, self.ln_post = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.transformer = nn.Sequential(*(ClipBlock(dim, heads) for _ in range(depth)))
        self.proj = nn.Parameter(torch.randn(dim, width) * dim**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        x = x.reshape(x.shape[0], x.shape[1], -1).permute(0, 2, 1)
        first = self.class_embedding.to(x.dtype) + torch.zeros(
            x.shape[0], 1, x.shape[-1], dtype=x.dtype, device=x.device
        )
        x = torch.cat([first, x], dim=1) + self.positional_embedding.to(x.dtype)
        x = self.transformer(self.ln_pre(x).permute(1, 0, 2)).permute(1, 0, 2)  # attention is over (L, B, D)
        return self.ln_post(x[:, 0, :]) @ self.proj


class Clip(nn.Module):
    """Images and texts in one space (CLIP, arXiv 2103.00020); either may be left out, as in open_clip."""

    def __init__(self, dim=32, heads=2, depth=(3, 2), width=16, size=32, patch=8, vocab=50, context=12) -> None:
        super().__init__()
        self.visual = ClipVision(dim, heads, depth[0], width, size, patch)
        mask = torch.full((context, context), -torch.inf).triu_(1)
        self.transformer = nn.Sequential(*(ClipBlock(dim, heads, mask) for _ in range(depth[1])))
        self.token_embedding, self.ln_final = nn.Embedding(vocab, dim), nn.LayerNorm(dim)
        self.positional_embedding = nn.Parameter(torch.randn(context, dim) * 0.01)
        self.text_projection = nn.Parameter(torch.randn(dim, width) * dim**-0.5)
        self.logit_scale = nn.Parameter(torch.ones([]) * math.log(1 / 0.07))

    @property
    def dtype(self) -> torch.dtype:
        return self.visual.conv1.weight.dtype

    def encode_image(self, image: Tensor) -> Tensor:
        return F.normalize(self.visual(image.type(self.dtype)), dim=-1)

    def encode_text(self, text: Tensor) -> Tensor:
        x = self.token_embedding(text).type(self.dtype) + self.positional_embedding.type(self.dtype)
        x = self.ln_final(self.transformer(x.permute(1, 0, 2)).permute(1, 0, 2)).type(self.dtype)
        last = text.argmax(dim=-1)  # the end of the text has the highest number
        return F.normalize(x[torch.arange(x.shape[0]), last] @ self.text_projection, dim=-1)

    def forward(self, image: Tensor | None = None, text: Tensor | None = None):
        image_features = self.encode_image(image) if image is not None else None
        text_features = self.encode_text(text) if text is not None else None
        return image_features, text_features, self.logit_scale.exp()
