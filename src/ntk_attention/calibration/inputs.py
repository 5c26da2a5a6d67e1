"""Inputs that a model makes for itself."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..tuner.distributed import device_of
from ..tuner.observation import evaluating


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
