"""The number of residuals to expect of each model of the zoo, counted by reading its code.

``c(class_name, predicate)`` is the number of modules of that class, so each formula says blocks times
adds. An add counts if its skip is a value (not a parameter, not a slice or projection of one) that
its branch is computed from. Of trunks inside the branches of others the one with the most residuals
counts. The note says where the adds are, and what is not counted.
"""

from __future__ import annotations

from collections.abc import Callable

Counts = dict[str, tuple[Callable[..., int], str]]

TIMM: Counts = {
    "adv_inception_v3": (
        lambda c: 0,
        "inception_v3.py: only concats",
    ),
    "beit_base_patch16_224": (
        lambda c: 2 * c("Block"),
        "beit.py:Block.forward attn + mlp (both gamma branches have 2 adds); rel-pos bias/pos adds no",
    ),
    "cait_xxs24_224": (
        lambda c: 2 * c("LayerScaleBlock") + 2 * c("LayerScaleBlockClassAttn"),
        "cait.py: attention and mlp of both block classes; the skip of the first class attention is the class "
        "token, a parameter, which attends to the image",
    ),
    "coat_tiny": (
        lambda c: 3 * c("SerialBlock") + 9 * c("ParallelBlock"),
        "coat.py: SerialBlock = cpe (ConvPosEnc: proj(feat)+feat, feat = img tokens) + attn + mlp = 3; per "
        "ParallelBlock: 3 attn + 3 mlp adds (x2,x3,x4) + 3 shared-cpe executions in CoaT.forward_features . "
        "cur2+up(cur3)+.. sums of projections no. Chains are cut by cpe slice+cat, no add lies between "
        "another's skip and add (x2's branch reads cur3, not the new x3)",
    ),
    "coatnet_pico_rw_224": (
        lambda c: (
            c("MbConvBlock", lambda b: type(b.shortcut).__name__ == "Identity")
            + c("TransformerBlock2d", lambda b: type(b.shortcut).__name__ == "Identity")
            + c("TransformerBlock2d")
        ),
        "maxxvit.py: MbConvBlock 1 / TransformerBlock2d attn 1 only with Identity shortcut (stride 2: "
        "Downsample2d pool[+conv]); TransformerBlock2d mlp always; rel-pos bias no",
    ),
    "convit_tiny": (
        lambda c: 2 * c("Block"),
        "convit.py:Block attn + mlp; GPSA gating mix and pos_embed no; cls token cat in the middle only cuts the chain",
    ),
    "convmixer_768_32": (
        lambda c: c("Residual"),
        "convmixer.py:Residual fn(x)+x around depthwise conv only; pointwise conv after it not residual",
    ),
    "convnext_zepto_rms": (
        lambda c: c("ConvNeXtBlock", lambda b: type(b.shortcut).__name__ == "Identity"),
        "convnext.py:ConvNeXtBlock drop_path(x)+shortcut; Mlp without GRN here",
    ),
    "cpubone_nano": (
        lambda c: c("ResidualBlock", lambda b: type(b.shortcut).__name__ == "Identity"),
        "cpubone.py:ResidualBlock with shortcut Identity (stem, stride-1 blocks, attn/mlp/local of "
        "CPUBoneBlock); shortcut None (stride-2 blocks) has no add; ConvAttention has no add",
    ),
    "crossvit_tiny_240": (
        lambda c: 2 * c("Block"),
        "vision_transformer.Block attn + mlp in both branches; CrossAttentionBlock `x[:,0:1] + "
        "attn(norm(x))`: skip is a slice, not counted",
    ),
    "cs3darknet_focus_s": (
        lambda c: c("DarkBlock"),
        "cspnet.py:DarkBlock drop_path(x)+shortcut always identity; x1 is a split half of conv_exp but the "
        "add's skip is x1 itself; CSP concat no",
    ),
    "csatv2": (
        lambda c: (
            c("Block")
            + 2 * c("TransformerBlock", lambda b: not b.downsample)
            + c("TransformerBlock", lambda b: b.downsample)
        ),
        "csatv2.py: Block 1, TransformerBlock attn + mlp. Nested, not counted: SpatialTransformerBlock's 2 "
        "adds (trunk of 2, and its PosConv) inside Block's branch, GRN x+.. inside Block, PosConv inside "
        "TransformerBlock's attn branch. Outer stage trunks 2,2,10,8 >= inner 2 (stages 0/1 equal: outer)",
    ),
    "cspnext_tiny": (
        lambda c: c("CspNextBlock", lambda b: b.add_identity),
        "cspnext.py:CspNextBlock only if add_identity (off in last stage); CSP/SPP concat no",
    ),
    "davit_tiny": (
        lambda c: (
            c("ConvPosEnc")
            + c("SpatialBlock")
            + c("SpatialBlock", lambda b: b.mlp is not None)
            + c("ChannelBlock")
            + c("ChannelBlock", lambda b: b.mlp is not None)
        ),
        "davit.py: per block cpe1, attn, cpe2, mlp (ConvPosEnc: x + act(proj(x))): 4 per block",
    ),
    "deepseek_vit_412m": (
        lambda c: 2 * c("DeepseekVitBlock"),
        "deepseek_vit.py:DeepseekVitBlock attn + mlp; rope no",
    ),
    "deit_tiny_patch16_224": (
        lambda c: 2 * c("Block"),
        "vision_transformer.py:Block attn + mlp; pos_embed no",
    ),
    "densenet121": (
        lambda c: 0,
        "densenet.py: concatenation only",
    ),
    "dla46x_c": (
        lambda c: (
            c("DlaTree", lambda t: t.levels == 1)
            + c(
                "DlaTree",
                lambda t: (
                    t.levels == 1
                    and type(t.downsample).__name__ == "Identity"
                    and (type(t.project).__name__ == "Identity")
                ),
            )
            + c("DlaRoot", lambda r: r.shortcut)
        ),
        "dla.py:DlaBottleneck out += shortcut. In each 1-level DlaTree: tree2 always x itself; tree1's "
        "shortcut = project(downsample(x)), identity only for the 2nd subtree of levels 3,4 (maxpool counts "
        "as projection). DlaRoot shortcut False here: no add. 6 + 2 = 8",
    ),
    "dpn48b": (
        lambda c: 0,
        "dpn.py:DualPathBlock x_s[:, :n] + out1: skip is a slice (of a concat) or of a projection",
    ),
    "edgenext_xx_small": (
        lambda c: c("ConvBlock") + c("SplitTransposeBlock"),
        "edgenext.py: ConvBlock shortcut + .. (even if shortcut_after_dw: skip = dw output, branch norm+mlp "
        "from it); SplitTransposeBlock outer shortcut counts. Nested, not counted: inner x + xca(norm(x)) "
        "(trunk of 1 inside the SplitTransposeBlock's branch), sp + spx[i], pos encoding",
    ),
    "efficientformer_l1": (
        lambda c: 2 * c("MetaBlock2d") + 2 * c("MetaBlock1d"),
        "efficientformer.py: token mixer + mlp adds; Pooling's pool(x) - x is a subtraction inside the "
        "branch, not counted",
    ),
    "efficientformerv2_s0": (
        lambda c: c("EfficientFormerV2Block") + c("EfficientFormerV2Block", lambda b: b.token_mixer is not None),
        "efficientformer_v2.py:EfficientFormerV2Block mlp always, attn if token_mixer; Attention2d `attn@v + "
        "v_local`, Downsample attn(x)+conv(x), LocalGlobalQuery local+pool: sums of projections, no",
    ),
    "efficientnet_b0": (
        lambda c: c("InvertedResidual", lambda b: b.has_skip) + c("DepthwiseSeparableConv", lambda b: b.has_skip),
        "_efficientnet_blocks.py: has_skip only",
    ),
    "efficientvim_m1": (
        lambda c: 4 * c("EfficientViMBlock") + 2 * c("PatchMerging"),
        "efficientvim.py: EfficientViMBlock 4 adds x + alpha*(f(x)-x) (dwconv1, mixer, dwconv2, ffn); "
        "PatchMerging x+dwconv1(x), x+dwconv2(x). HSMSSD h*act(z)+h*D is inside the mixer branch and "
        "pointwise",
    ),
    "efficientvit_b0": (
        lambda c: c("ResidualBlock", lambda b: type(b.shortcut).__name__ == "Identity"),
        "efficientvit_mit.py:ResidualBlock with shortcut Identity (stem, stage 1/2 repeats, context+local of "
        "EfficientVitBlock); None = no add",
    ),
    "efficientvit_m0": (
        lambda c: c("ResidualDrop"),
        "efficientvit_msra.py:ResidualDrop x + m(x): 5 per EfficientVitBlock, 4 per subsample (res1/res2); "
        "CascadedGroupAttention feat + feats_in[i] (different slice, inside branch) and attn bias no",
    ),
    "ens_adv_inception_resnet_v2": (
        lambda c: c("Block35") + c("Block17") + c("Block8"),
        "inception_resnet_v2.py: `out * scale + x` in Block35/17/8 (10+20+10); Mixed_* concat",
    ),
    "ese_vovnet19b_slim_dw": (
        lambda c: c("OsaBlock", lambda b: b.residual),
        "vovnet.py:OsaBlock.forward `x + output[0]` only if residual (i > 0 in stage); one block per stage -> "
        "0; ESE is a gate",
    ),
    "eva02_tiny_patch14_224": (
        lambda c: 2 * c("EvaBlock"),
        "eva.py:EvaBlock attn + mlp; pos_embed/rope no",
    ),
    "fasternet_t0": (
        lambda c: c("MLPBlock"),
        "fasternet.py:MLPBlock shortcut + mlp(partial_conv(x))",
    ),
    "fastvit_t8": (
        lambda c: (
            c("RepMixer", lambda m: m.reparam_conv is None)
            + c("RepMixerBlock")
            + 2 * c("AttentionBlock")
            + c("RepConditionalPosEnc", lambda m: m.reparam_conv is None)
        ),
        "fastvit.py: RepMixer x + ls(mixer(x)-norm(x)), RepMixerBlock x + ls(mlp(x)); MobileOneBlock / "
        "ReparamLargeKernelConv sums are reparam branches, no",
    ),
    "focalnet_tiny_srf": (
        lambda c: 2 * c("FocalNetBlock"),
        "focalnet.py:FocalNetBlock modulation + mlp; ctx_all accumulation inside FocalModulation no",
    ),
    "gcvit_xxtiny": (
        lambda c: 2 * c("GlobalContextVitBlock") + c("MbConvBlock"),
        "gcvit.py: block attn + mlp; MbConvBlock x + shortcut (always identity): 4 in Downsample2d (main "
        "path) + 7 in FeatureBlocks (global query)",
    ),
    "gemma4_vit_167m": (
        lambda c: 2 * c("Gemma4Block"),
        "gemma4_vit.py:Gemma4Block sandwich-norm attn + mlp; pos embedding/rope no",
    ),
    "ghostnet_050": (
        lambda c: c("GhostBottleneck", lambda b: len(b.shortcut) == 0),
        "ghostnet.py:GhostBottleneck x += shortcut(shortcut) with empty Sequential = identity; conv shortcuts "
        "project; GhostModule concat no",
    ),
    "gluon_resnet18_v1b": (
        lambda c: c("BasicBlock", lambda b: b.downsample is None),
        "resnet.py:BasicBlock.forward `x += shortcut`; identity blocks; downsample ones project",
    ),
    "gmlp_ti16_224": (
        lambda c: c("SpatialGatingBlock"),
        "mlp_mixer.py:SpatialGatingBlock.forward, 1 each; SpatialGatingUnit is a product",
    ),
    "halonet_h1": (
        lambda c: c("SelfAttnBlock", lambda b: type(b.shortcut).__name__ == "Identity"),
        "byobnet.py:SelfAttnBlock.forward `x + shortcut(shortcut)`, create_shortcut gives Identity if in==out "
        "and stride 1; ConvNormAct shortcut (first of stages 1-3) projects; HaloAttn rel-pos logits add no",
    ),
    "hardcorenas_b": (
        lambda c: c("InvertedResidual", lambda b: b.has_skip) + c("DepthwiseSeparableConv", lambda b: b.has_skip),
        "_efficientnet_blocks.py forward: `drop_path(x) + shortcut` if has_skip (stride 1, in==out); "
        "ConvBnAct (cn) has skip=False; SE gates no add",
    ),
    "hgnetv2_b0": (
        lambda c: c("HighPerfGpuBlock", lambda b: b.residual),
        "hgnet.py:HighPerfGpuBlock.forward, only blocks with residual=True (not the first of a stage); LAB "
        "scale*x+bias is a parameter add; stem/aggregation concat",
    ),
    "hiera_tiny_224": (
        lambda c: c("HieraBlock") + c("HieraBlock", lambda b: not b.do_expand),
        "hiera.py:HieraBlock.forward: mlp add always, attn add only if not do_expand (else skip = "
        "maxpool(proj(norm(x)))); pos_embed no",
    ),
    "hieradet_small": (
        lambda c: c("MultiScaleBlock") + c("MultiScaleBlock", lambda b: b.dim == b.dim_out and b.q_stride is None),
        "hieradet_sam2.py:MultiScaleBlock.forward: mlp add always, attn add only if dim==dim_out (else "
        "shortcut = pool(proj(norm)))",
    ),
    "hrnet_w18_small": (
        lambda c: c("BasicBlock", lambda b: b.downsample is None) + c("Bottleneck", lambda b: b.downsample is None),
        "resnet blocks with downsample None; all 5 Bottlenecks (layer1, incre_modules) project. Fuse sums y + "
        "f(x[j]) in HighResolutionModule and incre(y)+down(y) in the head add different branches (x_j not "
        "computed from the identity operand x_i), not counted",
    ),
    "iformer_t": (
        lambda c: c("Residual"),
        "iformer.py:Residual.forward `x + [gamma *] module(x)`: ConvBlock 1, RepCPE 1 (dw conv of x, a real "
        "residual), SHMABlock 1, FFN 1; distillation head sum no",
    ),
    "inception_next_atto": (
        lambda c: c("MetaNeXtBlock"),
        "inception_next.py:MetaNeXtBlock.forward, always identity",
    ),
    "inception_v4": (
        lambda c: 0,
        "inception_v4.py: only concats",
    ),
    "jx_nest_tiny": (
        lambda c: 2 * c("TransformerLayer"),
        "nest.py:TransformerLayer.forward attn + mlp; pos_embed no",
    ),
    "lcnetv2_small": (
        lambda c: c("RepDepthwiseSeparable", lambda b: b.use_shortcut),
        "lcnetv2.py:RepDepthwiseSeparable.forward `x + shortcut` if use_shortcut (last stage, stride 1); `out "
        "+ dw_conv(x)` is a sum of parallel conv branches, no",
    ),
    "legacy_seresnet18": (
        lambda c: c("SEResNetBlock", lambda b: b.downsample is None),
        "senet.py:SEResNetBlock.forward `se_module(out) + shortcut`; downsample ones project; SE is a gate",
    ),
    "levit_128s": (
        lambda c: 2 * c("LevitBlock") + c("LevitDownsample"),
        "levit.py: LevitBlock attn + mlp; LevitDownsample only mlp (attn_downsample has no skip); attention "
        "bias adds and head averaging no",
    ),
    "lowformer_b0": (
        lambda c: c("ResidualBlock", lambda b: b.shortcut is not None),
        "lowformer.py:ResidualBlock.forward, shortcut is Identity or None; LowFormerBlock = attn, mlp, local "
        "ResidualBlocks in sequence",
    ),
    "mobilenetv3_small_050": (
        lambda c: c("InvertedResidual", lambda b: b.has_skip) + c("DepthwiseSeparableConv", lambda b: b.has_skip),
        "_efficientnet_blocks.py: has_skip",
    ),
    "mobilenetv5_base": (
        lambda c: (
            c("EdgeResidual", lambda b: b.has_skip)
            + c("UniversalInvertedResidual", lambda b: b.has_skip)
            + c("MobileAttention", lambda b: b.has_skip)
            + c("MobileAttention", lambda b: b.conv_cpe_dw is not None)
        ),
        "_efficientnet_blocks.py: has_skip; MobileAttention has no CPE here; msfa.ffn "
        "(UniversalInvertedResidual) has noskip=True, msfa concatenates",
    ),
    "mobileone_s1": (
        lambda c: 0,
        "byobnet.py:MobileOneBlock sums bn(x)+conv1x1(x)+convkxk(x): reparam branches only, no identity skip",
    ),
    "mobilevit_xxs": (
        lambda c: c("BottleneckBlock", lambda b: type(b.shortcut).__name__ == "Identity") + 2 * c("Block"),
        "byobnet.py:BottleneckBlock with Identity shortcut (None otherwise, downsample=''); "
        "vision_transformer.py:Block 2 each inside MobileVitBlock; MobileVitBlock's own shortcut is "
        "concatenated",
    ),
    "mvitv2_tiny": (
        lambda c: (
            c("MultiScaleBlock", lambda b: b.shortcut_proj_mlp is None)
            + c("MultiScaleBlock", lambda b: b.shortcut_proj_attn is None and b.shortcut_pool_attn is None)
            + c(
                "MultiScaleBlock",
                lambda b: (
                    b.attn.residual_pooling and (not (b.shortcut_proj_attn is None and b.shortcut_pool_attn is None))
                ),
            )
        ),
        "mvitv2.py: MultiScaleBlock mlp add 10, attn add 7 (3 stage-transition blocks have Linear+MaxPool "
        "shortcut). Inner `x + q` residual pooling in MultiScaleAttention (x = attn(q,k,v), q identity): in 7 "
        "blocks nested in a counted attn residual (outer trunk longer, inner dropped)",
    ),
    "naflexvit_base_patch16_parfac_gap": (
        lambda c: 2 * c("Block"),
        "vision_transformer.py:Block.forward; pos_embed `x +=` no; avg pool head",
    ),
    "nasnetalarge": (
        lambda c: c("NormalCell") + c("FirstCell"),
        "nasnet.py: only comb_iter_4 `separable(x_right) + x_right` (1 per NormalCell/FirstCell). Not: "
        "comb_iter_2 `avgpool(x_right) + x_left` (different values), sums of two branches, stem and reduction "
        "cells (comb_iter_3 `avgpool(comb_0) + comb_1`: comb_0 not computed from comb_1)",
    ),
    "nextvit_small": (
        lambda c: 2 * c("NextConvBlock") + 3 * c("NextTransformerBlock"),
        "nextvit.py: NextConvBlock mhca + mlp (both after patch_embed, on its output); NextTransformerBlock "
        "e_mhsa, `out + mhca(out)` with out = projection(x), mlp on the concat; three trunks side by side "
        "(concat between), none inside a branch of another",
    ),
    "nf_regnet_b0": (
        lambda c: c("NormFreeBlock", lambda b: b.downsample is None),
        "nfnet.py:NormFreeBlock.forward `out * alpha + shortcut`, identity if downsample is None",
    ),
    "pit_ti_224": (
        lambda c: 2 * c("Block"),
        "pit.py uses vision_transformer.py:Block; pos_embed no; Pooling has no add",
    ),
    "pnasnet5large": (
        lambda c: 0,
        "pnasnet.py:CellBase.cell_forward: sums of two branches; comb_iter_4 `separable(x_left) + x_right` "
        "mixes different inputs (x_left = conv(prev), x_right = conv(cur)), so no residual",
    ),
    "poolformerv2_s12": (
        lambda c: 2 * c("MetaFormerBlock"),
        "metaformer.py:MetaFormerBlock.forward, token mixer + mlp",
    ),
    "pvt_v2_b0": (
        lambda c: 2 * c("Block"),
        "pvt_v2.py:Block.forward attn + mlp",
    ),
    "qwen3_vit_88m": (
        lambda c: 2 * c("EvaBlock"),
        "eva.py:EvaBlock.forward attn + mlp; rope x*cos + rot(x)*sin (inside attn) and pos_embed no",
    ),
    "rdnet_tiny": (
        lambda c: 0,
        "rdnet.py: dense connections by concat only; DenseBlock/Block/BlockESE have no add",
    ),
    "regnetx_002": (
        lambda c: c("Bottleneck", lambda b: type(b.downsample).__name__ == "Identity"),
        "regnet.py:Bottleneck.forward: downsample is Identity for in==out, stride 1; else conv",
    ),
    "repghostnet_050": (
        lambda c: c("RepGhostBottleneck", lambda b: len(b.shortcut) == 0),
        "repghost.py:RepGhostBottleneck.forward `x += shortcut(x)`, empty Sequential = identity; "
        "RepGhostModule `dw(x1) + bn(x1)`: skip through BN, no",
    ),
    "repvit_m1": (
        lambda c: c("RepVggDw") + c("RepViTBlock") + c("RepVitDownsample"),
        "repvit.py: RepVggDw.forward `bn(conv(x)+conv1(x)+x)` has x itself as the last operand -> counts "
        "(branch = conv(x)+conv1(x)); RepViTBlock.forward `identity + channel_mixer(x)`; "
        "RepVitDownsample.forward `x + identity` (ffn). conv(x)+conv1(x) itself is a projection sum; "
        "classifier (x1+x2)/2 sums projections",
    ),
    "res2next50": (
        lambda c: c("Bottle2neck", lambda b: b.downsample is None),
        "res2net.py:Bottle2neck.forward `out += shortcut`, identity blocks only (downsample is not None "
        "projects). Inner `sp = sp + spx[i]` does not count: spx[i] is another channel slice, sp is not "
        "computed from it",
    ),
    "resnest14d": (
        lambda c: c("ResNestBottleneck", lambda b: b.downsample is None),
        "resnest.py:ResNestBottleneck.forward `out += shortcut`; layers [1,1,1,1], each block has a "
        "downsample projection -> 0. SplitAttn uses sum(dim), no add",
    ),
    "resnetv2_18": (
        lambda c: c("PreActBasic", lambda b: b.downsample is None),
        "resnetv2.py:PreActBasic.forward `x + shortcut`; shortcut = x if downsample is None; else "
        "downsample(norm1(x)) projects (first block of stages 2-4; stage 1 has equal channels and no "
        "downsample)",
    ),
    "rexnet_100": (
        lambda c: c("LinearBottleneck", lambda b: b.use_shortcut),
        "rexnet.py:LinearBottleneck.forward `cat([x[:, :in_chs] + shortcut, x[:, in_chs:]])` if use_shortcut: "
        "the skip is the block input itself, only the BRANCH output is sliced, so the add has equal shapes "
        "and counts",
    ),
    "samvit_base_patch16_224": (
        lambda c: 2 * c("Block"),
        "vision_transformer_sam.py:Block.forward `shortcut + x` (attn) and mlp; pos_embed, rel pos bias do "
        "not count; neck is plain convs",
    ),
    "selecsls42": (
        lambda c: 0,
        "selecsls.py: concatenations only, no adds",
    ),
    "sequencer2d_s": (
        lambda c: 2 * c("Sequencer2dBlock"),
        "sequencer.py:Sequencer2dBlock.forward, rnn_tokens and mlp_channels; LSTM2d joins directions by cat",
    ),
    "shvit_s1": (
        lambda c: c("Residual"),
        "shvit.py:Residual.forward `x + m(x)`: conv/mixer/ffn of BasicBlock and 4 in each "
        "StageBlock.downsample (2 before, 2 after PatchMerging)",
    ),
    "skresnet18": (
        lambda c: c("SelectiveKernelBasic", lambda b: b.downsample is None),
        "sknet.py:SelectiveKernelBasic.forward `x += shortcut`; identity blocks; SelectiveKernel sums by sum(dim)",
    ),
    "starnet_s050": (
        lambda c: c("Block"),
        "starnet.py:Block.forward `residual + drop_path(x)`, always identity; star operation is a product",
    ),
    "swiftformer_xs": (
        lambda c: c("ConvEncoder") + c("LocalRepresentation") + 2 * c("Block"),
        "swiftformer.py: ConvEncoder.forward 1, LocalRepresentation.forward 1, Block.forward 2 (attn, "
        "linear). Nested case: EfficientAdditiveAttention.forward `proj(attn * key) + query` (attn derived "
        "from query: a residual on query) lies in the attn branch, a 1-residual trunk inside the stage trunk "
        "-> not counted. Head (head + head_dist)/2 sums projections",
    ),
    "swin_tiny_patch4_window7_224": (
        lambda c: 2 * c("SwinTransformerBlock"),
        "swin_transformer.py:SwinTransformerBlock.forward attn and mlp; relative position bias and mask adds "
        "do not count; PatchMerging has none",
    ),
    "swinv2_cr_tiny_224": (
        lambda c: 2 * c("SwinTransformerV2CrBlock"),
        "swin_transformer_v2_cr.py:SwinTransformerV2CrBlock.forward, post-norm attn and mlp; bias/mask adds "
        "do not count",
    ),
    "swinv2_tiny_window16_256": (
        lambda c: 2 * c("SwinTransformerV2Block"),
        "swin_transformer_v2.py:SwinTransformerV2Block.forward, res-post-norm attn and mlp; bias/mask adds do "
        "not count",
    ),
    "test_mambaout": (
        lambda c: c("GatedConvBlock"),
        "mambaout.py:GatedConvBlock.forward `x + shortcut`, always identity",
    ),
    "test_vit": (
        lambda c: 2 * c("Block"),
        "vision_transformer.py:Block.forward attn and mlp; pos_embed does not count",
    ),
    "test_vit_relpos": (
        lambda c: 2 * c("RelPosBlock"),
        "vision_transformer_relpos.py:RelPosBlock.forward attn and mlp; rel_pos/shared_rel_pos biases do not "
        "count, RelPosMlp has no residual",
    ),
    "tiny_vit_5m_224": (
        lambda c: c("MBConv") + 2 * c("TinyVitBlock"),
        "tiny_vit.py: MBConv.forward `x += shortcut` (always identity), TinyVitBlock.forward attn and mlp; "
        "local_conv between them has no residual; attn bias no",
    ),
    "tnt_s_legacy_patch16_224": (
        lambda c: 4 * c("Block"),
        "tnt.py:Block.forward: inner (pixel) attn_in, mlp_in and outer (patch) attn_out, mlp. Pixel trunk is "
        "not inside a patch branch (it never depends on patch_embed), both count. `patch_embed[:, 1:] + "
        "proj(pixel_embed)` does not: sliced skip, other operand not computed from it; pixel_pos/patch_pos "
        "positional",
    ),
    "tresnet_m": (
        lambda c: c("BasicBlock", lambda b: b.downsample is None) + c("Bottleneck", lambda b: b.downsample is None),
        "tresnet.py: BasicBlock/Bottleneck.forward `drop_path(out) + shortcut`; identity blocks (all 3 of "
        "layer1; the first of layers 2-4 project)",
    ),
    "twins_svt_small": (
        lambda c: 2 * c("Block") + c("PosConv", lambda b: b.stride == 1),
        "twins.py:Block.forward attn and mlp; PosConv.forward `x += cnn_feat_token` (depthwise conv PEG, skip "
        "is its own input, once per stage) counts",
    ),
    "vgg11": (
        lambda c: 0,
        "vgg.py: plain, no adds",
    ),
    "visformer_tiny": (
        lambda c: c("Block") + c("Block", lambda b: b.attn is not None),
        "visformer.py:Block.forward: mlp always, attn only if attn is not None (stage 1 blocks have none); "
        "pos_embed adds do not count",
    ),
    "vit_tiny_r_s16_p8_224": (
        lambda c: 2 * c("Block"),
        "vision_transformer.py:Block.forward attn and mlp; hybrid backbone is only the ResNetV2 stem "
        "(layers=()), no bottlenecks",
    ),
    "vitamin_small_224": (
        lambda c: c("MbConvLNBlock", lambda b: type(b.shortcut).__name__ == "Identity") + 2 * c("Block"),
        "vitamin.py:MbConvLNBlock.forward `drop_path(x) + shortcut`, Identity shortcut only (stride 2 blocks "
        "pool+conv); vision_transformer.py:Block.forward 2 each; GeGluMlp has no residual; pos_embed no",
    ),
    "volo_d1_224": (
        lambda c: 2 * c("Outlooker") + 2 * c("Transformer") + c("ClassBlock"),
        "volo.py: Outlooker.forward 2, Transformer.forward 2, ClassBlock.forward: `cls_embed + "
        "mlp(norm2(cls_embed))` counts; `cls_embed + attn(norm1(x))` does not (skip is the slice x[:, :1], "
        "branch is computed from the whole x). pos_embed and `out + 0.5 * aux.max` do not",
    ),
    "xception": (
        lambda c: c("Block", lambda b: b.skip is None),
        "xception.py:Block.forward `x += skip`; identity for blocks 4-11, the others project by skip conv + skipbn",
    ),
    "xception41p": (
        lambda c: c("PreXceptionModule", lambda b: not b.no_skip and type(b.shortcut).__name__ == "Identity"),
        "xception_aligned.py:PreXceptionModule.forward `y = norm_act(x); stack(y) + shortcut(y)`: skip and "
        "branch both start at y, Identity shortcut only (8 middle-flow blocks); strided blocks project by "
        "conv, the last block is no_skip (no add)",
    ),
    "xcit_nano_12_p8_224": (
        lambda c: 3 * c("XCABlock") + 2 * c("ClassAttentionBlock"),
        "xcit.py:XCABlock.forward attn, local_mp, mlp; ClassAttentionBlock.forward `x + gamma1 * cat(attn, "
        "norm1(x)[:, 1:])` and `x_res + cat(gamma2*mlp(cls), x[:, 1:])`: in both the skip is the whole token "
        "tensor and the branch (slices + concat) is computed from it; pos_encoding does not count",
    ),
}

TORCHVISION: Counts = {}


def _put(prefix, names, formula, note):
    for name in names.split():
        TORCHVISION[prefix + name] = (formula, note)


def _zero(c):
    return 0


def _resnet(c):
    return c("BasicBlock", lambda b: b.downsample is None) + c("Bottleneck", lambda b: b.downsample is None)


def _mbconv(c):
    return c("MBConv", lambda b: b.use_res_connect) + c("FusedMBConv", lambda b: b.use_res_connect)


def _inverted(c):
    return c("InvertedResidual", lambda b: b.use_res_connect)


_put(
    "",
    "alexnet vgg11 vgg11_bn vgg13 vgg13_bn vgg16 vgg16_bn vgg19 vgg19_bn",
    _zero,
    "plain chain of conv/relu/pool, no add",
)
_put(
    "",
    "densenet121 densenet161 densenet169 densenet201",
    _zero,
    "densenet.py: concatenation only, no add",
)
_put(
    "",
    "googlenet inception_v3 squeezenet1_0 squeezenet1_1",
    _zero,
    "parallel branches concatenated, no add (transform_input, off by default, adds constants only; aux "
    "heads of train mode hold none)",
)
_put(
    "",
    "shufflenet_v2_x0_5 shufflenet_v2_x1_0 shufflenet_v2_x1_5 shufflenet_v2_x2_0",
    _zero,
    "shufflenetv2.py:InvertedResidual.forward: chunk, cat and shuffle; no add",
)
_put(
    "",
    "convnext_tiny convnext_small convnext_base convnext_large",
    lambda c: c("CNBlock"),
    "convnext.py:CNBlock.forward: result += input, one a block; downsamplings (norm+conv) have none",
)
_put(
    "",
    " ".join(f"efficientnet_b{i}" for i in range(8)) + " efficientnet_v2_s efficientnet_v2_m efficientnet_v2_l",
    _mbconv,
    "efficientnet.py:MBConv/FusedMBConv.forward: result += input if use_res_connect (stride 1, equal "
    "channels); SE is a product",
)
_put(
    "",
    "maxvit_t",
    lambda c: c("MBConv", lambda b: type(b.proj).__name__ == "Identity") + 2 * c("PartitionAttentionLayer"),
    "maxvit.py:MBConv.forward: res + x counts where proj is Identity (not the stride-2 first of each "
    "block: avgpool+conv); PartitionAttentionLayer.forward: attn and mlp adds (window, grid); pos_bias "
    "does not count; the window partition (reshape) lies between residuals, not in a skip",
)
_put(
    "",
    "mnasnet0_5 mnasnet0_75 mnasnet1_0 mnasnet1_3",
    lambda c: c("_InvertedResidual", lambda b: b.apply_residual),
    "mnasnet.py:_InvertedResidual.forward: layers(input) + input if apply_residual",
)
_put(
    "",
    "mobilenet_v2",
    _inverted,
    "mobilenetv2.py:InvertedResidual.forward: x + conv(x) if use_res_connect",
)
_put(
    "",
    "mobilenet_v3_large mobilenet_v3_small",
    _inverted,
    "mobilenetv3.py:InvertedResidual.forward: result += input if use_res_connect; SE is a product",
)
_put(
    "",
    "regnet_x_16gf regnet_x_1_6gf regnet_x_32gf regnet_x_3_2gf regnet_x_400mf regnet_x_800mf regnet_x_8gf "
    "regnet_y_128gf regnet_y_16gf regnet_y_1_6gf regnet_y_32gf regnet_y_3_2gf regnet_y_400mf "
    "regnet_y_800mf regnet_y_8gf",
    lambda c: c("ResBottleneckBlock", lambda b: b.proj is None),
    "regnet.py:ResBottleneckBlock.forward: x + f(x) if proj is None; the first of each stage projects. "
    "Does not build under the meta device (BlockParams.from_init_params calls .item()/.tolist()): run "
    "that class method under torch.device('cpu')",
)
_put(
    "",
    "resnet18 resnet34 resnet50 resnet101 resnet152 resnext50_32x4d resnext101_32x8d resnext101_64x4d "
    "wide_resnet50_2 wide_resnet101_2",
    _resnet,
    "resnet.py:BasicBlock/Bottleneck.forward: out += identity where downsample is None; first of each "
    "stage projects (18/34: layer1's first does not)",
)
_put(
    "",
    "swin_t swin_s swin_b",
    lambda c: 2 * c("SwinTransformerBlock"),
    "swin_transformer.py:SwinTransformerBlock.forward: attn and mlp adds; relative bias, mask adds and "
    "PatchMerging do not count",
)
_put(
    "",
    "swin_v2_t swin_v2_s swin_v2_b",
    lambda c: 2 * c("SwinTransformerBlockV2"),
    "swin_transformer.py:SwinTransformerBlockV2.forward: x + norm(attn(x)), x + norm(mlp(x)); relative "
    "bias, mask adds do not count",
)
_put(
    "",
    "vit_b_16 vit_b_32 vit_l_16 vit_l_32 vit_h_14",
    lambda c: 2 * c("EncoderBlock"),
    "vision_transformer.py:EncoderBlock.forward: x + input, x + y; pos_embedding is a parameter add",
)
_put(
    "segmentation/",
    "fcn_resnet50 fcn_resnet101 deeplabv3_resnet50 deeplabv3_resnet101",
    _resnet,
    "resnet backbone, dilated layer3/layer4: their first blocks still have a downsample (channels "
    "change); FCN head is a chain, ASPP concatenates",
)
_put(
    "segmentation/",
    "deeplabv3_mobilenet_v3_large",
    _inverted,
    "mobilenet_v3 backbone (dilated: use_res_connect is unchanged); ASPP concatenates",
)
_put(
    "segmentation/",
    "lraspp_mobilenet_v3_large",
    _inverted,
    "mobilenet_v3 backbone; LRASPPHead: low_classifier(low) + high_classifier(x) is a sum of two "
    "projections: does not count",
)
_put(
    "video/",
    "r3d_18 mc3_18 r2plus1d_18",
    _resnet,
    "video/resnet.py:BasicBlock.forward: out += residual where downsample is None (first blocks of layer2-4 project)",
)
_put(
    "video/",
    "s3d",
    _zero,
    "video/s3d.py:SepInceptionBlock3D: branches concatenated, no add",
)
_put(
    "video/",
    "swin3d_t swin3d_s swin3d_b",
    lambda c: 2 * c("SwinTransformerBlock"),
    "SwinTransformerBlock.forward of swin_transformer.py with 3d window attention: attn and mlp adds; "
    "bias and mask adds do not count",
)
_put(
    "video/",
    "mvit_v1_b",
    lambda c: c("MultiscaleBlock", lambda b: b.pool_skip is None) + c("MultiscaleBlock", lambda b: b.project is None),
    "video/mvit.py:MultiscaleBlock.forward, proj_after_attn=False: attn add counts where pool_skip is "
    "None (else the skip is max-pooled), mlp add where project is None (else the skip is a Linear of the "
    "norm); residual_pool=False: no add in the attention; positional add does not count",
)
_put(
    "video/",
    "mvit_v2_s",
    lambda c: c("MultiscaleBlock", lambda b: b.pool_skip is None and b.project is None) + c("MultiscaleBlock"),
    "video/mvit.py:MultiscaleBlock.forward, proj_after_attn=True: attn add counts where neither pool_skip "
    "nor project, mlp add always. _add_shortcut (residual_pool): x[:, :, 1:] += q[:, :, 1:] in each of "
    "the 16 attentions: the skip is a slice, and 13 of them lie inside the attn branch of a counted "
    "residual (nested)",
)
_put(
    "detection/",
    "fasterrcnn_resnet50_fpn fasterrcnn_resnet50_fpn_v2 fcos_resnet50_fpn keypointrcnn_resnet50_fpn "
    "maskrcnn_resnet50_fpn maskrcnn_resnet50_fpn_v2 retinanet_resnet50_fpn retinanet_resnet50_fpn_v2",
    _resnet,
    "resnet50 body, blocks without downsample; FPN: inner_lateral + interpolate(last_inner) is a sum of "
    "projections: does not count; FrozenBatchNorm2d's x * scale + bias does not count",
)
_put(
    "detection/",
    "fasterrcnn_mobilenet_v3_large_fpn fasterrcnn_mobilenet_v3_large_320_fpn",
    _inverted,
    "mobilenet_v3_large body; FPN's top-down add (lateral conv + interpolated conv) does not count",
)
_put(
    "detection/",
    "ssd300_vgg16",
    _zero,
    "ssd.py:SSDFeatureExtractorVGG: vgg chain + extra convs, no add",
)
_put(
    "detection/",
    "ssdlite320_mobilenet_v3_large",
    _inverted,
    "mobilenet_v3_large (reduced tail as weights_backbone=None); the C4 block (stride 2, no residual) is "
    "split into two Sequentials; extra blocks are chains",
)
