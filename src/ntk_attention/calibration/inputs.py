"""What calibration looks at beside the batches of a task: text that a language model writes itself."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from ..tuner.distributed import device_of
from ..tuner.observation import base_model_of, evaluating
from .settings import CalibrationSettings

TEXT = {"input_ids", "attention_mask", "position_ids", "labels"}  # what batches of text alone may hold


def own_text(model: Any, batches: list[Mapping[str, Any]], settings: CalibrationSettings) -> list[Mapping[str, Any]]:
    """Text that the model writes from its first token, as one batch; no batch where it does not write text.

    Args:
        model: with or without adapters.
        batches: of the task. Beside pictures or sound a model writes nothing.
        settings: `own_rows` and `own_length` of them.

    Warns:
        UserWarning: if the model has a first token, but does not run on it alone.
    """
    start = start_token(model)
    if start is None or not all("input_ids" in batch and set(batch) <= TEXT for batch in batches):
        return []
    base = base_model_of(model)
    longest = getattr(text_config(base.config), "max_position_embeddings", None) or 2 * settings.own_length
    length = min(settings.own_length, longest // 2)  # some count positions from the padding token on
    try:
        text = samples(base, torch.full((settings.own_rows, 1), start), length, seed=0)
        with torch.no_grad(), evaluating(base):
            base(input_ids=text[:1])  # tokens that stand for pictures or sound would have to come with these
    except (ValueError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        warnings.warn(
            f"calibrate: {type(base).__name__} does not write text from its first token alone "
            f"({type(error).__name__}: {error}): coordinates see the batches alone",
            stacklevel=3,  # of `calibrate`
        )
        return []
    return [{"input_ids": text, "attention_mask": torch.ones_like(text)}]


@torch.no_grad()
def samples(model: PreTrainedModel, start: Tensor, length: int, seed: int) -> Tensor:
    """Continuations [B, length] of a start [B, L] at temperature 1, the start included and no token left out."""
    new = max(length - start.shape[1], 1)
    start = start.to(device_of(model))
    with torch.random.fork_rng([start.device] if start.device.type == "cuda" else []), evaluating(model):
        torch.manual_seed(seed)
        return model.generate(
            input_ids=start,
            attention_mask=torch.ones_like(start),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=True,
            top_k=0,
            top_p=1.0,
            temperature=1.0,
            repetition_penalty=1.0,
            pad_token_id=0,  # of which none is written: all rows are as long
        )


def start_token(model: Any) -> int | None:
    """What a text begins with, if the model writes texts and has such a token."""
    base = base_model_of(model)
    if not isinstance(base, PreTrainedModel) or not base.can_generate() or base.config.is_encoder_decoder:
        return None
    text = text_config(base.config)
    named = [getattr(text, name, None) for name in ("bos_token_id", "eos_token_id")]
    tokens = [token for value in named for token in (value if isinstance(value, list) else [value])]
    return next((token for token in tokens if token is not None and token < text.vocab_size), None)


def text_config(config: PreTrainedConfig) -> Any:
    """The part of a config that is about text; the config itself where there are several."""
    try:
        return config.get_text_config()
    except ValueError:
        return config
