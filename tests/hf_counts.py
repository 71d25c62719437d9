"""The number of residuals to expect of each model of the Hugging Face zoo, counted by reading its modeling code.

Each formula takes the model's configuration and says depth times adds of a block. An add counts if its skip is
a value that its branch is computed from, scaled or not; a sum of several branches over one skip, as in
``x + attn(x) + mlp(x)``, is one residual. Sums of experts, of position embeddings and of two projections do not
count; nor do projection shortcuts; nor adds inside the branch of another residual, since of trunks that nest
the one with the most residuals is converted. Counts are of adds that run: a block that runs five times counts
five times; ``looped`` also notes how often its adds are written. A note that begins with "doubtful" says
what else the number could be.
"""

from __future__ import annotations

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
        """afmoe apertus apertus1p5_text arcee aria_text axk1 axk2 bailing_hybrid bamba beam biogpt bitnet bloom cpmant
        ctrl cwm deepseek_v2 deepseek_v3 deepseek_v32 diffllama doge dots1 dots3_note_text ernie4_5 ernie4_5_moe exaone
        exaone4 exaone_moe falcon_h1 flex_olmo flint gemma gemma2 gemma3_text gemma4_unified_text glm glm4 glm4_moe
        glm4_moe_lite glm_moe_dsa gpt2 gpt_bigcode gpt_neo gpt_neox_japanese gpt_oss granite granite_swa
        granitemoe granitemoe_swa granitemoehybrid granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe hy_v3
        hyperclovax inkling_text internlm3 iquestcoder jais2 jamba jetmoe kimi_linear kolibri1 laguna lara_mini lfm2
        lfm2_moe lfm3 llama llama4_text mellum mimo_v2_flash minicpm3 minimax minimax_m2 minimax_m3_vl_text ministral
        ministral3 mistral mixtral modernbert-decoder moshi mpt nanochat nemotron olmo olmo2 olmo3 olmo_hybrid olmoe
        openai-gpt opt persimmon phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_5_moe_text qwen3_5_text qwen3_moe qwen3_next
        recurrent_gemma rwkv sarvam_mla sarvam_moe seed_oss smollm3 solar_open starcoder2 trocr vaultgemma
        xglm youtu""",
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
    "zamba": (
        lambda c: c.num_hidden_layers,
        "one mixer a layer. In a hybrid layer the branch reads h + shared_transformer(h): inside the branch, not on "
        "the trunk (its result is not added to the stream). Doubtful: plus one a hybrid layer, if those counted",
    ),
    "zamba2": (lambda c: c.num_hidden_layers, "as zamba"),
    "zaya": (
        lambda c: 2 * c.num_hidden_layers,
        "(f + b1) * s1 + (x + b2) * s2: the skip is shifted and scaled by parameters, pointwise",
    ),
    **every("deepseek_v4 hy_v4 qwen4_exp_text", REFUSED, "hyper-connected already"),
}

ENCODERS: Counts = {
    **every(
        """bert bert-generation big_bird bros camembert clip_text_model convbert data2vec-text deberta deberta-v2 distilbert
        dpr electra ernie esm esmc eurobert flaubert fnet gte ibert jina_embeddings_v3 layoutlm layoutlmv3 longformer
        luke markuplm megatron-bert modernbert mpnet mra nomic_bert nystromformer openai_privacy_filter rembert roberta
        roberta-prelayernorm roc_bert roformer splinter squeezebert tapas tipsv2_text_model ultrabert xlm xlm-roberta
        xlm-roberta-xl xlnet yoso""",
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
    "lilt": (lambda c: 4 * c.num_hidden_layers, "attention and MLP of the text and of the layout, two trunks"),
    "mobilebert": (
        lambda c: (1 + (c.num_feedforward_networks - 1) + 1 - 1) * c.num_hidden_layers,
        "doubtful: inside the bottleneck the stacked MLPs and the last one; the attention's skip is one projection of "
        "the layer's input and its branch comes from others, so not that one. Around them the output bottleneck adds "
        "the layer's input: one a layer, on a trunk of num_hidden_layers, which is shorter here",
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
        """bart bigbird_pegasus blenderbot blenderbot-small fsmt led longt5 m2m_100 marian mbart mt5 mvp nllb-moe pegasus plbart
        prophetnet seamless_m4t seamless_m4t_v2 switch_transformers t5 umt5""",
        _both,
        "encoder: attention and MLP; decoder: attention, cross attention, MLP; sparse MLPs are one branch",
    ),
    "pegasus_x": (
        lambda c: 4 * c.encoder_layers + 3 * c.decoder_layers,
        "the encoder's layers have two for the tokens and two for the global tokens, which are another trunk. "
        "Doubtful: the last layer's global ones are computed and dropped",
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
