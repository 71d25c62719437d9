"""The number of residuals to expect of each model of the Hugging Face zoo, counted by reading its modeling code.

Each formula takes the model's configuration and says depth times adds of a block. An add counts if its skip is
a value that its branch is computed from, scaled or not; a sum of several branches over one skip, as in
``x + attn(x) + mlp(x)``, is one residual. Sums of experts, of position embeddings and of two projections do not
count; nor do projection shortcuts; nor adds inside the branch of another residual, since of trunks that nest
the one with the most residuals is converted. Counts are of adds that run: a block that runs five times counts
five times; ``looped`` also notes how often its adds are written. A note with "doubtful" in it says
what else the number could be.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

Formula = Callable[[Any], int | None]
Counts = dict[str, tuple[Formula, str]]


def every(names: str, formula: Formula, note: str = "") -> Counts:
    """Return the same formula for several model types."""
    return {name: (formula, note) for name in names.split()}


def looped(runs: Formula, written: Formula) -> Formula:
    """Return the count of a model that calls a block again and again: its adds that run, or those written."""
    return runs if EVERY_CALL_COUNTS else written


EVERY_CALL_COUNTS = True
REFUSED = lambda c: None  # noqa: E731 - an expected refusal has no count

CAUSAL: Counts = {
    **every(
        """afmoe apertus apertus1p5_text arcee aria_text axk1 axk2 bailing_hybrid bamba beam biogpt bitnet bloom
        cpmant ctrl cwm deepseek_v2 deepseek_v3 deepseek_v32 diffllama doge dots1 dots3_note_text ernie4_5
        ernie4_5_moe exaone exaone4 exaone_moe falcon_h1 flex_olmo flint gemma gemma2 gemma3_text
        gemma4_unified_text glm glm4 glm4_moe glm4_moe_lite glm_moe_dsa gpt2 gpt_bigcode gpt_neo
        gpt_neox_japanese gpt_oss granite granite_swa granitemoe granitemoe_swa granitemoehybrid
        granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe hy_v3 hyperclovax inkling_text internlm3
        iquestcoder jais2 jamba jetmoe kimi_linear kolibri1 laguna lara_mini lfm2 lfm2_moe lfm3 llama
        llama4_text mellum mimo_v2_flash minicpm3 minimax minimax_m2 minimax_m3_vl_text ministral ministral3
        mistral mixtral modernbert-decoder moshi mpt nanochat nemotron olmo olmo2 olmo3 olmo_hybrid olmoe
        openai-gpt opt persimmon phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_5_moe_text qwen3_5_text qwen3_moe
        qwen3_next recurrent_gemma rwkv sarvam_mla sarvam_moe seed_oss smollm3 solar_open starcoder2 trocr
        vaultgemma xglm youtu""",
        lambda c: 2 * c.num_hidden_layers,
        "attention (or its linear, convolutional or recurrent stand-in) and MLP, one after the other, on the trunk; "
        "cross attention does not run without encoder states",
    ),
    **every(
        "codegen cohere cohere2 cohere2_moe cohere_compass_text gptj phi",
        lambda c: c.num_hidden_layers,
        "x + attention + MLP of one norm: one residual with two branches",
    ),
    "dory": (
        looped(
            lambda c: 2 * (c.n_input_layers + c.n_recurrent_loops * c.n_recurrent_layers + c.n_output_layers),
            lambda c: 2 * c.num_hidden_layers,
        ),
        "doubtful: h = norm(h); h + rate * (f(h) - h) twice a layer, the middle layers run in every loop. The parent's "
        "norm(h) + input_hidden_states is, from the second loop on, by the letter one more around the loop",
    ),
    "falcon": (
        lambda c: (1 if c.new_decoder_architecture or c.parallel_attn else 2) * c.num_hidden_layers,
        "parallel: mlp_output += attention_output is the sum of two branches",
    ),
    "falcon_mamba": (lambda c: c.num_hidden_layers, "one mixer a block; its scan + D * x is inside the branch"),
    "gemma3n_text": (
        lambda c: 2 * c.num_hidden_layers,
        "doubtful: the stream is altup's stack of four; predict adds predictions += hidden_states and correct adds "
        "innovation * coefs + predictions: two a layer on the trunk. Inside that branch active + attn (+ laurel) and "
        "+ ffw are two more a layer, on a trunk of two. An in-place add into a slice follows",
    ),
    "gemma4_text": (
        lambda c: (3 if c.hidden_size_per_layer_input else 2) * c.num_hidden_layers,
        "attention, MLP, and the gated input of the layer; layer_scalar multiplies the trunk after them",
    ),
    "gpt_neox": (lambda c: (1 if c.use_parallel_residual else 2) * c.num_hidden_layers, "parallel: one residual"),
    "hrm_text": (
        looped(lambda c: 2 * c.num_hidden_layers, lambda c: 4 * c.num_layers_per_stack),
        "doubtful: the layers of two stacks run H_cycles * L_cycles and H_cycles times (num_hidden_layers counts "
        "runs). The parent's high + low is one more in each cycle by the letter: low was computed from high",
    ),
    "longcat_flash": (
        lambda c: 4 * c.num_layers,
        "attention, MLP, attention, MLP; the experts' shortcut, computed from the first norm, joins the last "
        "sum: residual + mlp + shortcut. Doubtful only if that term were taken as a residual of its own",
    ),
    "mamba": (lambda c: c.num_hidden_layers, "one mixer a block; its scan + D * x is inside the branch"),
    "mamba2": (lambda c: c.num_hidden_layers, "one mixer a block; its scan + D * x is inside the branch"),
    "nemotron_h": (lambda c: len(c.layers_block_type), "one mixer a block, of whichever kind"),
    "stablelm": (lambda c: (1 if c.use_parallel_residual else 2) * c.num_hidden_layers, "parallel: one residual"),
    "xlstm": (lambda c: 2 * c.num_hidden_layers, "mLSTM and MLP"),
    "zamba": (
        lambda c: c.num_hidden_layers,
        "one mixer a layer. In a hybrid layer the branch reads h + shared_transformer(h): inside the branch, not on "
        "the trunk (its result is not added to the stream). Doubtful: plus one a hybrid layer, if those counted",
    ),
    "zamba2": (lambda c: c.num_hidden_layers, "as zamba"),
    "zaya": (
        lambda c: 2 * c.num_hidden_layers,
        "(f + b1) * s1 + (x + b2) * s2. Doubtful: the skip is shifted as well as scaled by parameters",
    ),
    **every("deepseek_v4 hy_v4", REFUSED, "hyper-connected already"),
    "qwen4_exp_text": (
        lambda c: 2 * c.num_hidden_layers,
        "hyper-connected already, but to its packed streams each layer adds twice what it makes of them",
    ),
}

ENCODERS: Counts = {
    **every(
        """bert bert-generation big_bird bros camembert clip_text_model convbert data2vec-text deberta deberta-v2
        distilbert dpr electra ernie esm esmc eurobert flaubert fnet gte ibert jina_embeddings_v3 layoutlm
        layoutlmv3 longformer luke markuplm megatron-bert modernbert mpnet mra nomic_bert nystromformer
        openai_privacy_filter rembert roberta roberta-prelayernorm roc_bert roformer splinter squeezebert tapas
        tipsv2_text_model ultrabert xlm xlm-roberta xlm-roberta-xl xlnet yoso""",
        lambda c: 2 * c.num_hidden_layers,
        "attention and MLP, before or after their norms; in XLM and FlauBERT the adds stand in the model's own forward",
    ),
    "albert": (
        looped(
            lambda c: 2 * c.num_hidden_layers * c.inner_group_num,
            lambda c: 2 * c.num_hidden_groups * c.inner_group_num,
        ),
        "attention and MLP of one block that all layers share",
    ),
    "canine": (
        lambda c: 2 * (1 + c.num_hidden_layers + 1),
        "a layer over characters, the layers over downsampled positions, a layer over characters again",
    ),
    "embedding_gemma2_text": (
        lambda c: (3 if c.hidden_size_per_layer_input else 2) * c.num_hidden_layers,
        "attention, MLP, and the gated input of the layer; layer_scalar multiplies the trunk after them",
    ),
    "funnel": (
        lambda c: 2 * (sum(s * r for s, r in zip(c.block_sizes, c.block_repeats, strict=True)) + c.num_decoder_layers),
        "doubtful: attention (its skip is the pooled query in a block's first layer) and MLP. The decoder's "
        "upsampled + first_block_hidden is one more by the letter, with the other blocks in its branch",
    ),
    "lilt": (
        lambda c: 4 * c.num_hidden_layers - 2,
        "attention and MLP of the text and of the layout, two trunks; what the last layer computes of the layout "
        "reaches no output",
    ),
    "mobilebert": (
        lambda c: c.num_feedforward_networks * c.num_hidden_layers,
        "inside the bottleneck the stacked MLPs and the last one, one stream that all of a layer runs through; the "
        "attention's skip is one projection of the layer's input and its branch comes from others, so not that one. "
        "Around them the output bottleneck adds the layer's input: one a layer, which are fewer",
    ),
    "xmod": (
        lambda c: 3 * c.num_hidden_layers,
        "doubtful: attention, MLP, and the language's adapter, whose output is written into zeros under a mask",
    ),
}


def _both(c: Any) -> int:
    encoder = getattr(c, "encoder_layers", None) or getattr(c, "num_encoder_layers", None) or c.num_layers
    decoder = getattr(c, "decoder_layers", None) or c.num_decoder_layers
    return 2 * encoder + 3 * decoder


SEQ2SEQ: Counts = {
    **every(
        """bart bigbird_pegasus blenderbot blenderbot-small fsmt led longt5 m2m_100 marian mbart mt5 mvp nllb-moe
        pegasus plbart prophetnet seamless_m4t seamless_m4t_v2 switch_transformers t5 umt5""",
        _both,
        "encoder: attention and MLP; decoder: attention, cross attention, MLP; sparse MLPs are one branch",
    ),
    "pegasus_x": (
        lambda c: 4 * c.encoder_layers - 2 + 3 * c.decoder_layers,
        "the encoder's layers have two for the tokens and two for the global tokens, which are another trunk; "
        "the last layer's global ones reach no output",
    ),
    "t5gemma": (
        lambda c: 2 * c.encoder.num_hidden_layers + 3 * c.decoder.num_hidden_layers,
        "encoder: attention and MLP; decoder: attention, cross attention, MLP",
    ),
    "t5gemma2": (
        lambda c: 2 * c.encoder.text_config.num_hidden_layers + 2 * c.decoder.num_hidden_layers,
        "the decoder's attention looks at both sides at once; the vision tower does not run on text",
    ),
}


def _identity_shortcuts(c: Any) -> int:
    """Blocks of a ResNet whose shortcut is the identity: neither the stride nor the width changes."""
    widths = [c.embedding_size, *c.hidden_sizes]
    first = [
        widths[i] == widths[i + 1] and i == 0 and not c.downsample_in_first_stage for i in range(len(c.hidden_sizes))
    ]
    return sum(depth - 1 + identity for depth, identity in zip(c.depths, first, strict=True))


def _detection(decoder: int) -> Formula:
    return lambda c: _identity_shortcuts(c.backbone_config) + 2 * c.encoder_layers + decoder * c.decoder_layers


DETECTION_NOTE = (
    "the backbone's blocks with identity shortcuts; encoder: attention and MLP; decoder: attention, cross attention, "
    "MLP. Positions are added to queries and keys only. The skip of the first decoder layer is zeros or a parameter, "
    "the same for every input: no stream begins there"
)

VISION: Counts = {
    **every(
        """vit deit beit data2vec-vision dinov2 dinov2_with_registers dinov3_vit dpt vit_mae vit_msn
        clip_vision_model vitdet ijepa aimv2_vision_model pixio mlcd_vision_model imagegpt internvl_vision
        chinese_clip_vision_model tipsv2_vision_model radio sapiens2 pixtral sam_vision_model
        sam_hq_vision_model sam3_vit_model videomae vilt vivit yolos""",
        lambda c: 2 * c.num_hidden_layers,
        "attention and MLP; windows are cut inside the attention's branch",
    ),
    **every(
        "siglip_vision_model siglip2_vision_model",
        lambda c: 2 * c.num_hidden_layers + 1,
        "attention and MLP; the pooling head's MLP after its attention, whose query is a parameter, is one more",
    ),
    **every(
        "clip chinese_clip owlvit",
        lambda c: 2 * c.text_config.num_hidden_layers + 2 * c.vision_config.num_hidden_layers,
        "attention and MLP in both towers",
    ),
    "siglip": (
        lambda c: 2 * c.text_config.num_hidden_layers + 2 * c.vision_config.num_hidden_layers + 1,
        "attention and MLP in both towers, and the MLP of the vision tower's pooling head",
    ),
    **every(
        "swin swinv2 donut-swin maskformer-swin segformer glpn pvt pvt_v2 poolformer focalnet",
        lambda c: 2 * sum(c.depths),
        "attention (or pooling, or focal modulation) and MLP in each block; merging and patch embedding end a trunk",
    ),
    "swin2sr": (
        lambda c: 2 * sum(c.depths),
        "doubtful: attention and MLP in each block; the stage's conv(blocks(x)) + x and the model's "
        "conv_after_body(...) + embeddings go around them, on trunks of fewer residuals",
    ),
    **every(
        "convnext convnextv2 dinov3_convnext",
        lambda c: sum(c.depths),
        "one add a block; GRN's weight * (x * norm) + bias + x is inside the branch",
    ),
    **every("resnet regnet", _identity_shortcuts, "blocks whose shortcut is the identity"),
    "bit": (lambda c: sum(c.depths) - len(c.depths), "a stage's first block projects its shortcut"),
    "hgnet_v2": (
        lambda c: sum(c.stage_num_blocks) - len(c.stage_num_blocks),
        "every block of a stage but the first",
    ),
    **every("conditional_detr detr table-transformer deformable_detr", lambda c: _detection(3)(c) - 1, DETECTION_NOTE),
    "cvt": (lambda c: 2 * sum(c.depth), "attention and MLP; the second sum goes through drop_path whole: carried"),
    "efficientnet": (
        lambda c: sum(math.ceil(c.depth_coefficient * repeats) - 1 for repeats in c.num_block_repeats),
        "every block of a stage but the first",
    ),
    "hiera": (
        lambda c: 2 * sum(c.depths) - (len(c.depths) - 1),
        "attention and MLP; a stage's first attention has a projected and pooled shortcut, but in the first stage",
    ),
    "levit": (
        lambda c: 2 * sum(c.depths) + len(c.depths) - 1,
        "attention and MLP; after each subsampling attention, which has no shortcut, one more MLP",
    ),
    "mobilenet_v1": (lambda c: 0, "no adds"),
    "mobilenet_v2": (
        lambda c: 1 + 2 + 3 + 2 + 2,
        "inverted residuals of stride 1 that keep their width: repeats after the first of 2, 3, 4, 3 and 3 blocks",
    ),
    "mobilevit": (
        lambda c: (3 - 1) + 2 * (2 + 4 + 3),
        "inverted residuals of stride 1 (two of stage 2), attention and MLP of 2, 4 and 3 transformer layers; the "
        "fusion with the layer's input is a concatenation",
    ),
    "mobilevitv2": (
        lambda c: (2 - 1) + 2 * sum(c.n_attn_blocks),
        "one inverted residual of stride 1 (stage 2), attention and MLP of the transformer layers",
    ),
    "sam": (
        lambda c: 2 * c.vision_config.num_hidden_layers + 4 * c.mask_decoder_config.num_hidden_layers - 1 + 1,
        "image encoder: attention and MLP; mask decoder: attention (without a skip in its first layer), cross "
        "attention, MLP, and cross attention of the image, whose stream is another trunk; one more cross attention "
        "after the layers",
    ),
    "swiftformer": (
        lambda c: sum((depth - 1) + 3 for depth in c.depths),
        "convolutional blocks one each; a stage's last block: local representation, attention, MLP. The attention's "
        "proj(...) + query is inside its branch",
    ),
}

AUDIO: Counts = {
    **every(
        "data2vec-audio hubert unispeech unispeech-sat wav2vec2 wavlm",
        lambda c: 2 * c.num_hidden_layers,
        "attention and MLP; the encoder's own forward adds the convolutional position embedding of x to x: one more "
        "by the letter, but in the code around a stack of blocks, which stays plain",
    ),
    "omniasr_audio": (
        lambda c: 2 * c.num_hidden_layers + 1,
        "attention and MLP, and a module that adds the convolutional position embedding of x to x",
    ),
    **every(
        """audio-spectrogram-transformer glmasr_encoder qwen2_audio_encoder sew sew-d voxtral_encoder""",
        lambda c: 2 * c.num_hidden_layers,
        "attention and MLP; in SEW the skip of the position embedding is pooled, so that is none",
    ),
    **every(
        "gemma4_audio lasr_encoder parakeet_encoder wav2vec2-bert wav2vec2-conformer",
        lambda c: 4 * c.num_hidden_layers,
        "half an MLP, attention, convolution, half an MLP; in lasr both terms are weighted",
    ),
    **every(
        "speech_to_text whisper",
        lambda c: 2 * c.encoder_layers + 3 * c.decoder_layers,
        "encoder: attention and MLP; decoder: attention, cross attention, MLP",
    ),
    "clap": (
        lambda c: 2 * sum(c.audio_config.depths) + 2 * c.text_config.num_hidden_layers,
        "attention and MLP of each block in both towers; the fusion block is off",
    ),
    "moonshine": (
        lambda c: 2 * c.encoder_num_hidden_layers + 3 * c.decoder_num_hidden_layers,
        "encoder: attention and MLP; decoder: attention, cross attention, MLP",
    ),
}

OTHER: Counts = {
    **every(
        "autoformer informer time_series_transformer",
        lambda c: 2 * c.encoder_layers + 3 * c.decoder_layers,
        "encoder: attention and MLP; decoder: attention, cross attention, MLP. Autoformer takes a moving average from "
        "the stream after each sum (x - average(x), no add), and sums up trends beside it",
    ),
    "blip_2_qformer": (
        lambda c: 2 * c.num_hidden_layers + math.ceil(c.num_hidden_layers / c.cross_attention_frequency),
        "attention and MLP, cross attention in every so manieth layer, over a slice that is the whole of the queries",
    ),
    "decision_transformer": (lambda c: 2 * c.num_hidden_layers, "attention and MLP; time embeddings do not count"),
    "git": (
        lambda c: 2 * c.num_hidden_layers + 2 * c.vision_config.num_hidden_layers,
        "attention and MLP in both towers",
    ),
    "llava": (
        lambda c: 2 * c.text_config.num_hidden_layers + 2 * c.vision_config.num_hidden_layers,
        "attention and MLP in both towers. Doubtful: the vision tower's last layer runs, but its output is not used",
    ),
    "lxmert": (
        lambda c: 2 * c.l_layers + 2 * c.r_layers + 6 * c.x_layers,
        "text and regions: attention and MLP; cross layers: cross attention, attention, MLP, in both streams. "
        "Doubtful: one cross attention module serves both streams, and is written once",
    ),
    "patchtsmixer": (lambda c: 2 * c.num_layers, "mixing of patches, and of features"),
    "patchtst": (
        lambda c: (3 if c.channel_attention else 2) * c.num_hidden_layers,
        "attention and MLP, behind batch norms",
    ),
    "perceiver": (
        looped(
            lambda c: 2 + 2 * c.num_blocks * c.num_self_attends_per_block,
            lambda c: 2 + 2 * c.num_self_attends_per_block,
        ),
        "cross attention, whose skip is the latents, a parameter, and its MLP, then attention and MLP of layers that "
        "every block runs again",
    ),
    **every(
        "timesfm timesfm2_5",
        lambda c: 2 * c.num_hidden_layers,
        "attention and MLP; the residual blocks before and after have projected shortcuts",
    ),
    "visual_bert": (lambda c: 2 * c.num_hidden_layers, "attention and MLP"),
    "vjepa2": (
        lambda c: 2 * c.num_hidden_layers + 2 * c.pred_num_hidden_layers,
        "attention and MLP in the encoder and the predictor; the pooler does not run",
    ),
}
