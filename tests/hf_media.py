"""Models of transformers for images, sound and other things, as hf_models.py has them for text."""

from __future__ import annotations

from hf_models import Settings, plain

STAGES = {"depths": [2, 1, 2, 1], "hidden_sizes": [8, 16, 24, 32]}
PYRAMID = {**STAGES, "num_attention_heads": [1, 2, 3, 4]}
WINDOWS = {"embed_dim": 8, "depths": [2, 2, 2], "num_heads": [1, 2, 4], "patch_size": 2, "window_size": 4}
BACKBONE = {"model_type": "resnet", **STAGES, "embedding_size": 8, "out_features": ["stage4"]}
DETECTION = {"backbone_config": BACKBONE, "num_queries": 6}

VISION: Settings = {
    **plain("""
        vit deit beit data2vec-vision dinov2 dinov2_with_registers dinov3_vit dpt vit_mae vit_msn
        siglip_vision_model siglip2_vision_model clip_vision_model vitdet ijepa aimv2_vision_model pixio
        mlcd_vision_model imagegpt internvl_vision chinese_clip_vision_model tipsv2_vision_model sapiens2
        pixtral sam3_vit_model mobilenet_v2 mobilenet_v1 clip siglip chinese_clip owlvit
    """),
    "bit": {**STAGES, "num_groups": 4},
    "conditional_detr": DETECTION,
    "convnext": STAGES,
    "convnextv2": STAGES,
    "cvt": {"embed_dim": [8, 16, 32], "num_heads": [1, 2, 4], "depth": [1, 2, 3]},
    "deformable_detr": {
        "backbone_config": {**BACKBONE, "out_features": ["stage2", "stage3", "stage4"]},
        "num_queries": 6,
        "num_feature_levels": 3,
    },
    "detr": DETECTION,
    "dinov3_convnext": STAGES,
    "donut-swin": WINDOWS,
    "efficientnet": {
        "width_coefficient": 0.5,
        "depth_coefficient": 1.1,
        "hidden_dim": 640,
        "num_block_repeats": [1, 2, 2, 1, 1, 2, 1],
    },
    "focalnet": {**STAGES, "embed_dim": 8, "patch_size": 2, "hidden_sizes": [16, 32, 64, 64]},
    "glpn": PYRAMID,
    "hgnet_v2": {
        **STAGES,
        "stem_channels": [3, 8, 8],
        "stage_in_channels": [8, 16, 24, 32],
        "stage_mid_channels": [8] * 4,
        "stage_out_channels": [16, 24, 32, 32],
        "stage_num_blocks": [1, 2, 3, 1],
        "stage_numb_of_layers": [2] * 4,
    },
    "hiera": {
        "embed_dim": 8,
        "depths": [1, 2, 2, 1],
        "num_heads": [1, 2, 4, 8],
        "image_size": [64, 64],
        "patch_size": [7, 7],
    },
    "levit": {
        "hidden_sizes": [16, 24, 32],
        "num_attention_heads": [2, 3, 4],
        "depths": [2, 1, 2],
        "key_dim": [8, 8, 8],
        "image_size": 64,
        "patch_size": ...,
    },
    "maskformer-swin": WINDOWS,
    "mobilevit": {
        "hidden_sizes": [16, 24, 32],
        "neck_hidden_sizes": [8, 16, 16, 24, 24, 32, 32],
        "image_size": 64,
        "patch_size": 2,
    },
    "mobilevitv2": {"base_attn_unit_dims": [16, 24, 32], "n_attn_blocks": [1, 2, 1], "image_size": 64, "patch_size": 2},
    "poolformer": {**STAGES, "patch_size": ...},
    "pvt": {**PYRAMID, "image_size": 64},
    "pvt_v2": {**PYRAMID, "image_size": 64},
    "radio": {},
    "regnet": {**STAGES, "embedding_size": 8, "groups_width": 4},
    "resnet": {**STAGES, "embedding_size": 8},
    "sam": {
        "vision_config": {
            "output_channels": 32,
            "mlp_dim": 64,
            "window_size": 3,
            "global_attn_indexes": [1],
            "num_pos_feats": 16,
        },
        "prompt_encoder_config": {"mask_input_channels": 8},
        "mask_decoder_config": {"iou_head_hidden_dim": 16},
    },
    "sam_vision_model": {"output_channels": 16, "mlp_dim": 64, "window_size": 3, "global_attn_indexes": [1]},
    "sam_hq_vision_model": {"output_channels": 16, "mlp_dim": 64, "window_size": 3, "global_attn_indexes": [1]},
    "segformer": PYRAMID,
    "swiftformer": {"depths": [1, 2, 1, 2], "embed_dims": [8, 16, 24, 32]},
    "swin": WINDOWS,
    "swin2sr": {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 2], "patch_size": 1, "window_size": 4},
    "swinv2": WINDOWS,
    "table-transformer": DETECTION,
    "videomae": {"num_frames": 4, "tubelet_size": 2},
    "vilt": {},
    "vivit": {"num_frames": 4, "tubelet_size": [2, 8, 8]},
    "yolos": {"image_size": [32, 32], "num_detection_tokens": 5},
}

CONVOLUTIONS = {
    "conv_dim": [16, 16, 16],
    "conv_stride": [5, 2, 2],
    "conv_kernel": [10, 3, 2],
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
}
MELS = {"num_mel_bins": 16}
SHORT = {**MELS, "max_source_positions": 16}  # whisper's encoder takes one length only
CONFORMER = {**MELS, "subsampling_conv_channels": 8, "conv_kernel_size": 5}

AUDIO: Settings = {
    **{
        name: CONVOLUTIONS
        for name in """data2vec-audio hubert omniasr_audio sew sew-d unispeech unispeech-sat wav2vec2
        wav2vec2-conformer wavlm""".split()
    },
    "audio-spectrogram-transformer": {**MELS, "max_length": 24, "frequency_stride": 4, "time_stride": 4},
    "clap": {
        "audio_config": {
            "spec_size": 64,
            "num_mel_bins": 16,
            "window_size": 4,
            "depths": [1, 2],
            "num_attention_heads": [2, 4],
            "patch_embeds_hidden_size": 16,
            "hidden_size": 32,
            "patch_size": 4,
            "num_hidden_layers": 2,
        }
    },
    "gemma4_audio": {"subsampling_conv_channels": [16, 8], "attention_chunk_size": 4, "attention_context_left": 5},
    "glmasr_encoder": MELS,
    "lasr_encoder": CONFORMER,
    "moonshine": {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in {
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
        }.items()
    },
    "parakeet_encoder": CONFORMER,
    "qwen2_audio_encoder": SHORT,
    "speech_to_text": {"input_feat_per_channel": 16, "conv_channels": 16},
    "voxtral_encoder": SHORT,
    "wav2vec2-bert": {"feature_projection_input_dim": 16, "conv_depthwise_kernel_size": 5},
    "whisper": SHORT,
}

SERIES = {
    "prediction_length": 4,
    "context_length": 12,
    "lags_sequence": [1, 2, 3],
    "num_time_features": 2,
    "cardinality": [5],
    "embedding_dimension": [3],
    "num_static_categorical_features": 1,
}

OTHER: Settings = {
    "autoformer": {**SERIES, "label_length": 2, "moving_average": 5},
    "blip_2_qformer": {"encoder_hidden_size": 32},
    "decision_transformer": {"n_positions": 64},
    "git": {"vision_config": {"image_size": 16}},
    "informer": SERIES,
    "llava": {"image_token_index": 3, "vision_config": {"model_type": "clip_vision_model", "image_size": 16}},
    "lxmert": {"l_layers": 2, "x_layers": 2, "r_layers": 1, "visual_feat_dim": 12},
    "patchtsmixer": {"context_length": 32, "num_input_channels": 3},
    "patchtst": {"context_length": 32, "patch_length": 8, "patch_stride": 4, "num_input_channels": 3},
    "perceiver": {
        "num_latents": 8,
        "d_latents": 32,
        "num_blocks": 2,
        "num_self_attends_per_block": 2,
        "num_self_attention_heads": 4,
        "num_cross_attention_heads": 4,
    },
    "time_series_transformer": SERIES,
    "timesfm": {"patch_length": 8, "horizon_length": 8, "context_length": 32},
    "timesfm2_5": {"patch_length": 8, "horizon_length": 8, "context_length": 32, "num_key_value_heads": 4},
    "visual_bert": {"visual_embedding_dim": 12},
    "vjepa2": {
        "crop_size": 32,
        "frames_per_clip": 4,
        "pred_hidden_size": 32,
        "pred_num_attention_heads": 4,
        "pred_num_hidden_layers": 2,
        "pred_num_mask_tokens": 2,
        "num_pooler_layers": 1,
    },
}

# Lengths (sides, for images) of the two examples, where they are not the usual ones of their kind; the same twice
# where a model takes one only.
LENGTHS: dict[str, tuple[int, int]] = {
    **dict.fromkeys((f"vision:{name}" for name in ("clip", "siglip", "chinese_clip", "owlvit", "vilt")), (32, 32)),
    **dict.fromkeys(
        (
            f"vision:{name}"
            for name in """bit convnext convnextv2 conditional_detr cvt deformable_detr detr dinov3_convnext
            efficientnet focalnet glpn hgnet_v2 mobilenet_v1 mobilenet_v2 mobilevit mobilevitv2 poolformer pvt_v2 regnet
            resnet segformer swiftformer table-transformer""".split()
        ),
        (64, 96),
    ),
    **dict.fromkeys((f"vision:{name}" for name in ("hiera", "levit", "pvt")), (64, 64)),
    **dict.fromkeys(
        (f"vision:{name}" for name in ("swin", "swinv2", "swin2sr", "donut-swin", "maskformer-swin")), (32, 48)
    ),
    "vision:imagegpt": (12, 9),
    **dict.fromkeys((f"audio:{name}" for name in ("clap", "audio-spectrogram-transformer")), (24, 24)),
    **dict.fromkeys((f"audio:{name}" for name in ("whisper", "qwen2_audio_encoder", "voxtral_encoder")), (32, 32)),
    **dict.fromkeys((f"audio:{name}" for name in AUDIO if AUDIO[name] is CONVOLUTIONS), (800, 620)),
    "audio:moonshine": (4000, 3200),
    **dict.fromkeys((f"other:{name}" for name in ("patchtst", "patchtsmixer")), (32, 32)),
    **dict.fromkeys((f"other:{name}" for name in ("autoformer", "informer", "time_series_transformer")), (12, 12)),
    **dict.fromkeys((f"other:{name}" for name in ("timesfm", "timesfm2_5")), (32, 16)),
    "other:vjepa2": (32, 32),
}
