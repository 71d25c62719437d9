"""Tiny random models of transformers: one table of small values for the names that configurations share."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

# Widths are multiples of the heads, so that every family takes them; what a configuration lacks is left out.
SMALL: dict[str, Any] = {
    # width
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embed_dim", "dim", "embedding_size", "emb_dim"), 32),
    **dict.fromkeys(("decoder_hidden_size", "projection_dim", "rotary_dim", "bottleneck_size"), 32),
    **dict.fromkeys(("word_embed_proj_dim", "attention_hidden_size", "lru_width", "linear_size"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "n_inner", "d_ff"), 64),
    **dict.fromkeys(("hidden_dim", "decoder_intermediate_size", "ffn_hidden_size", "mlp_dim"), 64),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 32),
    "moe_shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "intermediate_size_mlp": 64,
    # depth
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_decoder_layers", "num_encoder_layers", "decoder_num_hidden_layers", "depth"), 2),
    # heads
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_head", "n_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "decoder_num_attention_heads", "num_kv_heads"), 4),
    "num_key_value_heads": 2,
    **dict.fromkeys(("head_dim", "d_kv", "attention_head_dim", "swa_head_dim", "global_head_dim"), 8),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank"), 8),
    "q_lora_rank": 16,
    # experts: all of them in one group
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "num_shared_experts"), 1),
    "first_k_dense_replace": 1,
    # state spaces and linear attention
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 4),
    # vocabulary and length
    **dict.fromkeys(("vocab_size", "src_vocab_size", "tgt_vocab_size", "decoder_vocab_size", "entity_vocab_size"), 99),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_source_positions"), 128),
    **dict.fromkeys(("max_target_positions", "max_seq_len", "max_sequence_length", "context_length"), 128),
    "max_encoder_position_embeddings": 128,
    "max_decoder_position_embeddings": 128,
    "sliding_window": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    # images and sound
    "image_size": 32,
    "patch_size": 8,
    "mask_time_prob": 0.0,  # drawn by numpy, whose seed the checks do not set
    "mask_feature_prob": 0.0,
    "apply_spec_augment": False,
    # dropout everywhere, so that train mode is not eval mode; whole layers are not dropped
    **dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob", "attention_dropout", "dropout"), 0.1),
    **dict.fromkeys(("activation_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "resid_dropout"), 0.1),
    **dict.fromkeys(("embed_dropout", "hidden_dropout", "dropout_rate", "residual_dropout"), 0.1),
    **dict.fromkeys(("layerdrop", "encoder_layerdrop", "decoder_layerdrop"), 0.0),
}


def tiny_config(model_type: str, /, **settings: Any) -> Any:
    """Return a small configuration: ``SMALL`` where the class has the name, ``settings`` over it.

    A value ``...`` keeps the class's default. Configurations inside it are small too; settings for them are dicts,
    with the model type where it is not the default one. A backbone is left as it is unless settings name one.
    """
    from transformers import CONFIG_MAPPING

    return _tiny(CONFIG_MAPPING[model_type], settings)


def _tiny(cls: Any, settings: dict[str, Any]) -> Any:
    from transformers import CONFIG_MAPPING

    known = {f.name for f in dataclasses.fields(cls)}
    values = {name: value for name, value in SMALL.items() if name in known} | settings
    for name, spec in cls.sub_configs_defaults.items():
        inner = values.get(name)
        if inner is ... or (inner is None and (name == "backbone_config" or spec.optional)):
            continue
        inner = dict(inner or {})
        model_type = inner.pop("model_type", spec.model_type)
        known_type = model_type in CONFIG_MAPPING
        values[name] = _tiny(CONFIG_MAPPING[model_type] if known_type else spec.config_class, inner)
    return cls(**{name: value for name, value in values.items() if value is not ...})


def build(mapping: str, config: Any) -> nn.Module:
    """Build the model that one of transformers' mappings (or a class of that name) gives for a configuration."""
    import transformers

    found = getattr(transformers, mapping)
    cls = found if isinstance(found, type) else found[type(config)]
    torch.manual_seed(0)
    return (cls[0] if isinstance(cls, tuple) else cls)(config).eval()
