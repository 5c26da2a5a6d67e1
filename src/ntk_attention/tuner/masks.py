"""Which real tokens a query sees: one mask out of those that transformers makes for each attention implementation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_mask

FLEX = "flex_attention"
FLASH = ("flash_attention_2", "flash_attention_3", "flash_attention_4")
PAGED = ("paged|sdpa", "paged|eager")  # what continuous batching makes of "sdpa" and "eager"
IMPLEMENTATIONS = ("sdpa", "eager", FLEX, *FLASH, *PAGED)


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

    Continuous batching packs the sequences of a batch into one row, with a mask that keeps them apart. Up to
    transformers 5.22 its functions also put keys and values into the cache and get those of earlier tokens.

    Raises:
        ValueError: for a mask of another kind than the implementation has.
    """
    if implementation in PAGED:
        is_causal = False
        if options.get("cache") is not None:
            key, value = update_paged_cache(module, key, value, **options)
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
    if attention_mask is not None and attention_mask.dim() == 2 and implementation in PAGED:
        attention_mask = attention_mask[None, None]
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


def update_paged_cache(
    module: nn.Module, key: Tensor, value: Tensor, cache: Any, read_index: Any, write_index: Any, **_: Any
) -> tuple[Tensor, Tensor]:
    """Keys and values [1, H_kv, S, d] of all tokens of the sequences in the batch, the new ones among them."""
    key, value = cache.update(
        key_states=key, value_states=value, layer_idx=module.layer_idx, read_index=read_index, write_index=write_index
    )
    return key.transpose(0, 1)[None], value.transpose(0, 1)[None]


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
    cu_seq_lens_k: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor | None, bool]:
    """What flash attention hides: a bool mask [B or 1, 1, L, S], or none where `is_causal` alone says it.

    Causality is aligned bottom-right. Several texts packed into one row do not see each other; transformers tells so by
    where their queries and keys begin and end, `cu_seq_lens_q` and `cu_seq_lens_k` (keys of earlier tokens come from a
    cache), or by positions that start again.
    """
    L, S = num_queries, num_keys
    if L == 1 and cu_seq_lens_q is None:
        causal = False
    window = sliding_window if sliding_window is not None and sliding_window < S else None
    if cu_seq_lens_q is None and padding is None and L == S > 1:
        cu_seq_lens_q = boundaries(position_ids, L)
    if padding is None and window is None and cu_seq_lens_q is None and (L == S or not causal):
        return None, causal
    places_q, places_k = torch.arange(S - L, S, device=device), torch.arange(S, device=device)
    together = None
    if cu_seq_lens_q is not None:
        ends_q = cu_seq_lens_q.to(device)
        ends_k = ends_q if cu_seq_lens_k is None else cu_seq_lens_k.to(device)
        text_q = torch.bucketize(torch.arange(L, device=device), ends_q[1:], right=True)
        text_k = torch.bucketize(places_k, ends_k[1:], right=True)
        # Beyond the last text stands padding, which sees nothing and is not seen.
        together = (text_q[:, None] == text_k) & (text_q < len(ends_q) - 1)[:, None]
        # A place counts from the end of its text's keys.
        places_q = torch.arange(L, device=device) - ends_q[1:][text_q.clamp_max(len(ends_q) - 2)]
        places_k = places_k - ends_k[1:][text_k.clamp_max(len(ends_k) - 2)]
    distance = places_q[:, None] - places_k
    visible = torch.ones(1, 1, L, S, dtype=torch.bool, device=device)
    if causal:
        visible = visible & (distance >= 0)
    if window is not None:
        visible = visible & (distance.abs() < window)
    if together is not None:
        visible = visible & together
    if padding is not None:
        visible = visible & padding.bool()[:, None, None, :]
    return visible, False


def boundaries(position_ids: Tensor | None, length: int) -> Tensor | None:
    """Where packed texts begin and end, as their positions tell; None for one text."""
    if position_ids is None or position_ids.shape != (1, length):
        return None
    starts = position_ids[0].diff(prepend=position_ids[0, :1]) != 1
    starts[0] = True
    if int(starts.sum()) == 1:
        return None
    return nn.functional.pad(starts.nonzero().squeeze(1), (0, 1), value=length)
