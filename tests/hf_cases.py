"""What is in the Hugging Face zoo: how each model is made, its example inputs, and the residuals to expect."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import hf_counts
import hf_inputs
import hf_media
import hf_models
from hf_counts import Counts, Formula
from hf_inputs import Inputs
from hf_tiny import build, tiny_config
from torch import nn


@dataclass(frozen=True)
class Case:
    """One model of the zoo.

    Attributes:
        name: "task:model_type".
        kind: causal_lm, encoder, seq2seq, vision, audio or other.
        make: builds it with random weights, the same each time, in eval mode.
        inputs: keyword arguments for a batch size and a length.
        expected: the number of residuals, from the configuration; None where conversion is to be refused.
        note: where the adds are.
        generates: whether greedy ``generate()`` is compared.
        lengths: of the example, and of another call; the same twice where a model takes one length only.
        skip: checks that the model itself does not pass, each with the reason.
    """

    name: str
    kind: str
    make: Callable[[], nn.Module]
    inputs: Callable[[int, int], dict[str, Any]]
    expected: Formula
    note: str = ""
    generates: bool = False
    lengths: tuple[int, int] = (12, 9)
    skip: dict[str, str] | None = None


def _cases(
    kind: str,
    mapping: str,
    models: hf_models.Settings,
    counts: Counts,
    inputs: Callable[[Any], Inputs],
    **options: Any,
) -> Iterator[Case]:
    for model_type, settings in models.items():

        def config(model_type: str = model_type, settings: dict[str, Any] = settings) -> Any:
            return tiny_config(model_type, **settings)

        def make(config: Callable[[], Any] = config) -> nn.Module:
            return build(mapping, config())

        def example(batch: int, length: int, config: Callable[[], Any] = config) -> dict[str, Any]:
            return inputs(config())(batch, length)

        formula, note = counts[model_type]
        name = f"{kind}:{model_type}"
        lengths = hf_media.LENGTHS.get(name, options.get("lengths", (12, 9)))
        further = {**options, "lengths": lengths, "skip": hf_models.SKIP.get(name)}
        yield Case(name, kind, make, example, formula, note, **further)


CASES = [
    *_cases(
        "causal_lm",
        "MODEL_FOR_CAUSAL_LM_MAPPING",
        hf_models.CAUSAL,
        hf_counts.CAUSAL,
        hf_inputs.text,
        generates=True,
    ),
    *_cases("encoder", "MODEL_MAPPING", hf_models.ENCODERS, hf_counts.ENCODERS, hf_inputs.encoder),
    *_cases(
        "seq2seq",
        "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
        hf_models.SEQ2SEQ,
        hf_counts.SEQ2SEQ,
        hf_inputs.seq2seq,
        generates=True,
    ),
    *_cases("vision", "MODEL_MAPPING", hf_media.VISION, hf_counts.VISION, hf_inputs.images, lengths=(32, 32)),
    *_cases("audio", "MODEL_MAPPING", hf_media.AUDIO, hf_counts.AUDIO, hf_inputs.sound, lengths=(24, 16)),
    *_cases("other", "MODEL_MAPPING", hf_media.OTHER, hf_counts.OTHER, hf_inputs.others),
]
