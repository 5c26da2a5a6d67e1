"""Random inputs beside a task's, for the ablations of what calibration sees."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig

from ntk_attention.calibration.inputs import text_config
from ntk_attention.tuner.batches import SIGNALS


def with_random_inputs(model: Any, batches: list[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The batches of one kind, with other contents: random tokens for text, noise for a picture or sound.

    Special tokens stay, and none are drawn. Noise has the mean and deviation of what it stands for.
    """
    config = getattr(model, "config", None)
    text = text_config(config) if isinstance(config, PreTrainedConfig) else config
    size = getattr(text, "vocab_size", None)
    generator = torch.Generator().manual_seed(0)
    special = torch.tensor(special_tokens(config) + special_tokens(text), dtype=torch.long)
    found: list[Mapping[str, Any]] = []
    for batch in batches:
        signals = {name: x for name, x in batch.items() if name in SIGNALS}
        if "input_ids" in batch and not signals and size is not None:
            ids = batch["input_ids"].cpu()
            drawn = torch.randint(size, ids.shape, generator=generator)
            drawn = torch.where(torch.isin(ids, special) | torch.isin(drawn, special), ids, drawn)
            found.append({**batch, "input_ids": drawn.to(batch["input_ids"].device)})
        elif "input_ids" not in batch and len(signals) == 1:
            ((name, x),) = signals.items()
            noise = torch.randn(x.shape, generator=generator).to(x)
            found.append({**batch, name: x.mean() + x.std() * noise})
    return found


def special_tokens(config: Any) -> list[int]:
    """The ids that a config gives a meaning: ends, padding, places of pictures and so on."""
    named = [value for name, value in vars(config).items() if name.endswith(("_token_id", "_token_index"))]
    return [x for value in named for x in (value if isinstance(value, list) else [value]) if isinstance(x, int)]
