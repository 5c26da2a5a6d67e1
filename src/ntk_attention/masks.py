"""Which real tokens a query sees: one mask out of those that transformers makes for each attention implementation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_mask

FLEX = "flex_attention"
FLASH = ("flash_attention_2", "flash_attention_3", "flash_attention_4")
IMPLEMENTATIONS = ("sdpa", "eager", FLEX, *FLASH)


def visible_tokens(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | BlockMask | None,
    implementation: str,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor | None, bool]:
    """Key, value, one mask (bool or additive) and is_causal, by the rules of the base implementation.

    sdpa leaves the mask out where causality alone says it all, eager and FlexAttention never do. An empty static cache
    has more keys than queries in the first pass, which is_causal (aligned top-left) cuts off. Flash attention gets
    which keys are padding, [B, S], and makes the rest itself.

    Raises:
        ValueError: for a mask of another kind than the implementation has.
    """
    L, S = query.shape[2], key.shape[2]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if isinstance(attention_mask, BlockMask):
        B, H = attention_mask.shape[:2]
        attention_mask = create_mask(attention_mask.mask_mod, B, H, L, S, query.device)
    if implementation in FLASH:
        if attention_mask is not None and attention_mask.shape[1] < S:  # of a static cache, what is filled
            S = attention_mask.shape[1]
            key, value = key[:, :, :S], value[:, :, :S]
        attention_mask, causal = flash_mask(L, S, query.device, attention_mask, causal, **options)
    if attention_mask is not None and attention_mask.dim() != 4:
        raise ValueError(
            f"{type(module).__name__} passed a mask of shape {list(attention_mask.shape)}: NTK-Attention reads the "
            f"4-dimensional masks of {implementation!r}"
        )
    if attention_mask is not None and attention_mask.shape[-1] > S:
        attention_mask = attention_mask[..., :S]
    causal = implementation in ("sdpa", *FLASH) and L > 1 and attention_mask is None and causal
    if causal and S > L:
        key, value = key[:, :, :L], value[:, :, :L]
        position_bias = None if position_bias is None else position_bias[..., :L]
    if position_bias is None:
        return key, value, attention_mask, causal
    # T5: a bias on the logits, merged with the mask
    lowest = torch.finfo(position_bias.dtype).min
    if causal:
        attention_mask = torch.ones(L, key.shape[2], dtype=torch.bool, device=key.device).tril()
    if attention_mask is None:
        mask = position_bias
    elif attention_mask.dtype == torch.bool:
        mask = torch.where(attention_mask, position_bias, lowest)
    else:
        mask = position_bias + attention_mask
    return key, value, mask, False


def flash_mask(
    num_queries: int,
    num_keys: int,
    device: torch.device,
    padding: Tensor | None,
    causal: bool,
    *,
    sliding_window: int | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor | None, bool]:
    """What flash attention hides: a bool mask [B or 1, 1, L, S], or none where `is_causal` alone says it.

    Causality is aligned bottom-right. Several texts packed into one row do not see each other; transformers tells so by
    `cu_seq_lens_q`, or by positions that start again.
    """
    L, S = num_queries, num_keys
    if L == 1:
        causal = False
    window = sliding_window if sliding_window is not None and sliding_window < S else None
    segments = None
    if cu_seq_lens_q is not None:
        segments = torch.bucketize(torch.arange(L, device=device), cu_seq_lens_q[1:].to(device), right=True)
    elif padding is None and position_ids is not None and position_ids.shape == (1, L) and L == S > 1:
        starts = position_ids[0].diff(prepend=position_ids[0, :1]) != 1
        starts[0] = False
        if starts.any():
            segments = starts.cumsum(0)
    if padding is None and window is None and segments is None and (L == S or not causal):
        return None, causal
    distance = torch.arange(S - L, S, device=device)[:, None] - torch.arange(S, device=device)
    visible = torch.ones(1, 1, L, S, dtype=torch.bool, device=device)
    if causal:
        visible = visible & (distance >= 0)
    if window is not None:
        visible = visible & (distance.abs() < window)
    if segments is not None:
        visible = visible & (segments[:, None] == segments)
    if padding is not None:
        visible = visible & padding.bool()[:, None, None, :]
    return visible, False
