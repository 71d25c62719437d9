"""Example inputs of the Hugging Face zoo: ``inputs(config)(batch, length)`` gives a model's keyword arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Kwargs = dict[str, Any]
Inputs = Callable[[int, int], Kwargs]
FIRST_TOKEN = 5  # below are padding and other special tokens


def vocabulary(config: Any) -> int:
    """Return the number of tokens that a configuration's text part has."""
    for part in (config, *(getattr(config, n, None) for n in ("text_config", "decoder", "encoder"))):
        if size := getattr(part, "vocab_size", None):
            return size
    return 99


def tokens(batch: int, length: int, limit: int) -> Tensor:
    """Return token numbers without special ones."""
    return torch.randint(FIRST_TOKEN, limit, (batch, length))


def text(config: Any, *, mask: bool = True) -> Inputs:
    """Token numbers, and a mask that hides nothing."""

    def inputs(batch: int, length: int) -> Kwargs:
        ids = tokens(batch, length, vocabulary(config))
        return {"input_ids": ids, **({"attention_mask": torch.ones_like(ids)} if mask else {})}

    return inputs


def boxes(batch: int, length: int, limit: int = 50) -> Tensor:
    """Return corners of boxes: left, top, right, bottom."""
    low = torch.randint(0, limit // 2, (batch, length, 2))
    return torch.cat([low, low + torch.randint(1, limit // 2, (batch, length, 2))], -1)


def encoder(config: Any) -> Inputs:
    """As ``text``, with what some encoders ask for beside it."""
    plain = text(config)

    def inputs(batch: int, length: int) -> Kwargs:
        kwargs = plain(batch, length)
        if config.model_type in ("layoutlm", "layoutlmv3", "lilt"):
            kwargs["bbox"] = boxes(batch, length)
        if config.model_type == "bros":
            kwargs["bbox"] = torch.rand(batch, length, 4)
        return kwargs

    return inputs


def seq2seq(config: Any) -> Inputs:
    """Token numbers for the encoder, fewer of them for the decoder."""
    plain = text(config)

    def inputs(batch: int, length: int) -> Kwargs:
        return {**plain(batch, length), "decoder_input_ids": tokens(batch, length // 2 + 1, vocabulary(config))}

    return inputs


def images(config: Any) -> Inputs:
    """Images, or clips of them, of a side; with text for models that take both."""

    def inputs(batch: int, side: int) -> Kwargs:
        vision = getattr(config, "vision_config", config)
        pixels = torch.randn(batch, getattr(vision, "num_channels", 3), side, side)
        if config.model_type == "imagegpt":
            return {"input_ids": tokens(batch, side, config.vocab_size - 1)}
        if config.model_type in ("videomae", "vivit"):
            return {"pixel_values": pixels[:, None] + 0.5 * torch.randn(batch, config.num_frames, 1, 1, 1)}
        if config.model_type == "siglip2_vision_model":
            return _patches(batch, side // config.patch_size, 3 * config.patch_size**2)
        if config.model_type in ("clip", "siglip", "chinese_clip", "owlvit", "vilt"):
            return {**text(config)(batch, 12), "pixel_values": pixels}
        if config.model_type == "sam":
            return {"pixel_values": pixels, "input_points": side * torch.rand(batch, 1, 2, 2)}
        return {"pixel_values": pixels}

    return inputs


def _patches(batch: int, side: int, width: int) -> Kwargs:
    return {
        "pixel_values": torch.randn(batch, side * side, width),
        "pixel_attention_mask": torch.ones(batch, side * side, dtype=torch.long),
        "spatial_shapes": torch.full((batch, 2), side),
    }


def sound(config: Any) -> Inputs:
    """Waves, or spectra over time, as a model takes them; for a decoder, tokens beside them."""
    name = config.model_type

    def inputs(batch: int, length: int) -> Kwargs:
        if name in ("whisper", "qwen2_audio_encoder", "voxtral_encoder", "glmasr_encoder"):  # (B, mels, T)
            kwargs = {"input_features": torch.randn(batch, config.num_mel_bins, length)}
        elif name == "audio-spectrogram-transformer":
            kwargs = {"input_values": torch.randn(batch, length, config.num_mel_bins)}
        elif name == "clap":
            mels = torch.randn(batch, 1, 60, config.audio_config.num_mel_bins)
            kwargs = {"input_features": mels, "is_longer": torch.zeros(batch, 1, dtype=torch.bool), **_words(batch)}
        elif name == "gemma4_audio":
            mels = torch.randn(batch, 4 * length, config.subsampling_conv_channels[0])
            kwargs = {"input_features": mels, "attention_mask": torch.ones(batch, 4 * length, dtype=torch.bool)}
        elif name == "speech_to_text":
            kwargs = {"input_features": torch.randn(batch, 4 * length, config.input_feat_per_channel)}
        elif name == "wav2vec2-bert":
            kwargs = {"input_features": torch.randn(batch, length, config.feature_projection_input_dim)}
        elif name in ("parakeet_encoder", "lasr_encoder"):  # (B, T, mels)
            kwargs = {"input_features": torch.randn(batch, 8 * length, config.num_mel_bins)}
        elif name == "omniasr_audio":
            kwargs = {"input_values": torch.randn(batch, 1, length)}
        else:
            kwargs = {"input_values": torch.randn(batch, length)}
        if config.is_encoder_decoder:
            kwargs["decoder_input_ids"] = tokens(batch, 7, config.vocab_size)
        return kwargs

    return inputs


def _words(batch: int) -> Kwargs:
    ids = tokens(batch, 9, 99)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def others(config: Any) -> Inputs:
    """What models of time series, trajectories, latents and several modalities take."""
    return {
        "blip_2_qformer": _queries,
        "decision_transformer": _trajectory,
        "git": _text_and_image,
        "llava": _text_with_image,
        "lxmert": _text_and_regions,
        "patchtsmixer": _channels,
        "patchtst": _channels,
        "perceiver": _array,
        "timesfm": _padded_series,
        "timesfm2_5": _padded_series,
        "visual_bert": _text_and_regions,
        "vjepa2": _video,
    }.get(config.model_type, _series)(config)


def _series(config: Any) -> Inputs:
    """A time series, what is known of each moment, and what is to be predicted."""

    def inputs(batch: int, length: int) -> Kwargs:
        past, future, features = length + max(config.lags_sequence), config.prediction_length, config.num_time_features
        return {
            "past_values": torch.rand(batch, past) + 0.5,
            "past_time_features": torch.randn(batch, past, features),
            "past_observed_mask": torch.ones(batch, past),
            "static_categorical_features": torch.randint(0, config.cardinality[0], (batch, 1)),
            "future_values": torch.rand(batch, future) + 0.5,
            "future_time_features": torch.randn(batch, future, features),
        }

    return inputs


def _padded_series(config: Any) -> Inputs:
    def inputs(batch: int, length: int) -> Kwargs:
        kwargs: Kwargs = {
            "past_values": torch.randn(batch, length),
            "past_values_padding": torch.zeros(batch, length, dtype=torch.long),
        }
        if config.model_type == "timesfm":
            kwargs["freq"] = torch.zeros(batch, 1, dtype=torch.long)
        return kwargs

    return inputs


def _channels(config: Any) -> Inputs:
    return lambda batch, length: {"past_values": torch.randn(batch, length, config.num_input_channels)}


def _trajectory(config: Any) -> Inputs:
    def inputs(batch: int, length: int) -> Kwargs:
        return {
            "states": torch.randn(batch, length, config.state_dim),
            "actions": torch.randn(batch, length, config.act_dim),
            "rewards": torch.randn(batch, length, 1),
            "returns_to_go": torch.randn(batch, length, 1),
            "timesteps": torch.arange(length).expand(batch, length),
            "attention_mask": torch.ones(batch, length),
        }

    return inputs


def _queries(config: Any) -> Inputs:
    def inputs(batch: int, length: int) -> Kwargs:
        return {
            "query_embeds": torch.randn(batch, length, config.hidden_size),
            "encoder_hidden_states": torch.randn(batch, 7, config.encoder_hidden_size),
        }

    return inputs


def _array(config: Any) -> Inputs:
    return lambda batch, length: {"inputs": torch.randn(batch, length, config.d_model)}


def _text_and_regions(config: Any) -> Inputs:
    plain = text(config)

    def inputs(batch: int, length: int) -> Kwargs:
        if config.model_type == "lxmert":
            regions = {
                "visual_feats": torch.randn(batch, 5, config.visual_feat_dim),
                "visual_pos": torch.rand(batch, 5, 4),
            }
        else:
            regions = {
                "visual_embeds": torch.randn(batch, 5, config.visual_embedding_dim),
                "visual_attention_mask": torch.ones(batch, 5),
            }
        return {**plain(batch, length), **regions}

    return inputs


def _text_and_image(config: Any) -> Inputs:
    plain = text(config)
    side = config.vision_config.image_size
    return lambda batch, length: {**plain(batch, length), "pixel_values": torch.randn(batch, 3, side, side)}


def _text_with_image(config: Any) -> Inputs:
    """Tokens among which stand as many image tokens as the image has patches."""
    plain = _text_and_image(config)
    vision = config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2

    def inputs(batch: int, length: int) -> Kwargs:
        kwargs = plain(batch, length)
        kwargs["input_ids"][:, 1 : 1 + patches] = config.image_token_index
        return kwargs

    return inputs


def _video(config: Any) -> Inputs:
    return lambda batch, side: {"pixel_values_videos": torch.randn(batch, config.frames_per_clip, 3, side, side)}
