"""Which real tokens a query sees: one mask out of those that transformers makes for each attention implementation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_mask

FLEX = "flex_attention"
FLASH = ("flash_attention_2", "flash_attention_3", "flash_attention_4")
PAGED = ("paged|sdpa", "paged|eager")  # what continuous batching makes of "sdpa" and "eager"
IMPLEMENTATIONS = ("sdpa", "eager", FLEX, *FLASH, *PAGED)


class VisibleTokens(NamedTuple):
    """The tokens that the queries of one call see, in the same form for every implementation.

    Args:
        key: [B, H_kv, S, d].
        value: [B, H_kv, S, d_v].
        mask: bool, True where a query sees a key, or added to the logits; broadcast to [B, H, L, S]. None for all.
        is_causal: whether query i sees keys up to i alone (aligned top-left, then without a mask).
    """

    key: Tensor
    value: Tensor
    mask: Tensor | None
    is_causal: bool


def visible_tokens(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | BlockMask | None,
    implementation: str,
    **options: Any,
) -> VisibleTokens:
    """Key, value, one mask (bool or additive) and is_causal, by the rules of the base implementation.

    sdpa leaves the mask out where causality alone says it all, eager and FlexAttention never do. An empty static cache
    has more keys than queries in the first pass, which is_causal (aligned top-left) cuts off. Flash attention gets
    which keys are padding, [B, S], and makes the rest itself.

    Continuous batching packs the sequences of a batch into one row, with a mask that keeps them apart. Up to
    transformers 5.22 its functions also put keys and values into the cache and get those of earlier tokens.

    Args:
        module: of attention, as it calls its attention function.
        query: [B, H, L, d].
        key: [B, H_kv, S, d].
        value: [B, H_kv, S, d_v].
        attention_mask: of the kind that the implementation has.
        implementation: one of IMPLEMENTATIONS.
        options: the keyword arguments of the call; those that say what is visible are read.

    Raises:
        ValueError: for a mask of another kind than the implementation has.
    """
    causal = options.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if implementation in PAGED:
        causal = False
        if options.get("cache") is not None:
            key, value = update_paged_cache(module, key, value, **options)
    L, S = query.shape[2], key.shape[2]
    mask = attention_mask
    if isinstance(mask, BlockMask):
        B, H = mask.shape[:2]
        mask = create_mask(mask.mask_mod, B, H, L, S, query.device)
    if implementation in FLASH:
        if mask is not None and mask.shape[1] < S:  # of a static cache, what is filled
            S = mask.shape[1]
            key, value = key[:, :, :S], value[:, :, :S]
        mask, causal = flash_mask(L, S, query.device, FlashArguments.of_call(mask, causal, options))
    mask = checked_mask(mask, S, implementation, module)
    causal = implementation in ("sdpa", *FLASH) and L > 1 and mask is None and causal
    bias = options.get("position_bias")
    if causal and S > L:
        key, value = key[:, :, :L], value[:, :, :L]
        bias = None if bias is None else bias[..., :L]
    if bias is None:
        return VisibleTokens(key, value, mask, causal)
    if causal:
        mask = torch.ones(L, key.shape[2], dtype=torch.bool, device=key.device).tril()
    return VisibleTokens(key, value, with_bias(mask, bias), False)


def checked_mask(mask: Tensor | None, num_keys: int, implementation: str, module: nn.Module) -> Tensor | None:
    """The mask [B or 1, H or 1, L or 1, S] for the S keys that there are.

    Raises:
        ValueError: for one of another number of dimensions.
    """
    if mask is None:
        return None
    if mask.dim() == 2 and implementation in PAGED:
        mask = mask[None, None]
    if mask.dim() != 4:
        raise ValueError(
            f"{type(module).__name__} passed a mask of shape {list(mask.shape)}: NTK-Attention reads the "
            f"4-dimensional masks of {implementation!r}"
        )
    return mask[..., :num_keys] if mask.shape[-1] > num_keys else mask


def with_bias(mask: Tensor | None, position_bias: Tensor) -> Tensor:
    """T5's bias on the logits [B or 1, H, L, S] and a mask, as one additive mask."""
    if mask is None:
        return position_bias
    if mask.dtype == torch.bool:
        return torch.where(mask, position_bias, torch.finfo(position_bias.dtype).min)
    return position_bias + mask


def update_paged_cache(
    module: nn.Module, key: Tensor, value: Tensor, cache: Any, read_index: Any, write_index: Any, **_: Any
) -> tuple[Tensor, Tensor]:
    """Keys and values [1, H_kv, S, d] of all tokens of the sequences in the batch, the new ones among them; these are
    put into the cache, as the module's own function would."""
    key, value = cache.update(
        key_states=key, value_states=value, layer_idx=module.layer_idx, read_index=read_index, write_index=write_index
    )
    return key.transpose(0, 1)[None], value.transpose(0, 1)[None]


@dataclass(frozen=True)
class FlashArguments:
    """What transformers tells flash attention of who sees whom.

    Args:
        causal: aligned bottom-right.
        padding: [B, S], 0 or False at keys that nobody sees.
        sliding_window: how far a query sees, itself counted.
        position_ids: [1, L] where several texts may be packed into one row, each of which starts again.
        cu_seq_lens_q: int, where the queries of packed texts begin, and the last ones end.
        cu_seq_lens_k: likewise of their keys, where these are others: earlier ones come from a cache.
    """

    causal: bool
    padding: Tensor | None = None
    sliding_window: int | None = None
    position_ids: Tensor | None = None
    cu_seq_lens_q: Tensor | None = None
    cu_seq_lens_k: Tensor | None = None

    @classmethod
    def of_call(cls, padding: Tensor | None, causal: bool, options: Mapping[str, Any]) -> FlashArguments:
        """Out of the keyword arguments of a call."""
        names = ("sliding_window", "position_ids", "cu_seq_lens_q", "cu_seq_lens_k")
        return cls(causal, padding, **{name: options.get(name) for name in names})


def flash_mask(
    num_queries: int, num_keys: int, device: torch.device, told: FlashArguments
) -> tuple[Tensor | None, bool]:
    """What flash attention hides: a bool mask [B or 1, 1, L, S], or none where `is_causal` alone says it.

    Several texts packed into one row do not see each other; transformers tells so by where their queries and keys
    begin and end, or by positions that start again.
    """
    L, S = num_queries, num_keys
    starts_q, padding, window = told.cu_seq_lens_q, told.padding, told.sliding_window
    causal = told.causal and not (L == 1 and starts_q is None)
    window = None if window is None or window >= S else window
    if starts_q is None and padding is None and L == S > 1:
        starts_q = boundaries(told.position_ids, L)
    if padding is None and window is None and starts_q is None and (L == S or not causal):
        return None, causal
    visible = torch.ones(1, 1, L, S, dtype=torch.bool, device=device)
    if starts_q is None:
        distance = torch.arange(S - L, S, device=device)[:, None] - torch.arange(S, device=device)
    else:
        starts_k = starts_q if told.cu_seq_lens_k is None else told.cu_seq_lens_k
        together, distance = packed_texts(L, S, starts_q.to(device), starts_k.to(device))
        visible = visible & together
    if causal:
        visible = visible & (distance >= 0)
    if window is not None:
        visible = visible & (distance.abs() < window)
    if padding is not None:
        visible = visible & padding.bool()[:, None, None, :]
    return visible, False


def packed_texts(num_queries: int, num_keys: int, starts_q: Tensor, starts_k: Tensor) -> tuple[Tensor, Tensor]:
    """Of each query and key in a row of packed texts, [L, S]: whether they are of one text, and the distance from the
    key to the query, which counts from the end of the text's keys.

    Beyond the last text stands padding, which sees nothing and is not seen.
    """
    device, last = starts_q.device, len(starts_q) - 2
    query, key = torch.arange(num_queries, device=device), torch.arange(num_keys, device=device)
    text_q = torch.bucketize(query, starts_q[1:], right=True)
    text_k = torch.bucketize(key, starts_k[1:], right=True)
    together = (text_q[:, None] == text_k) & (text_q <= last)[:, None]
    place_q = query - starts_q[1:][text_q.clamp_max(last)]
    place_k = key - starts_k[1:][text_k.clamp_max(len(starts_k) - 2)]
    return together, place_q[:, None] - place_k


def boundaries(position_ids: Tensor | None, length: int) -> Tensor | None:
    """Where packed texts begin and end, as their positions tell; None for one text."""
    if position_ids is None or position_ids.shape != (1, length):
        return None
    starts = position_ids[0].diff(prepend=position_ids[0, :1]) != 1
    starts[0] = True
    if int(starts.sum()) == 1:
        return None
    return nn.functional.pad(starts.nonzero().squeeze(1), (0, 1), value=length)
