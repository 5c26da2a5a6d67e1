"""Attention beside FlashAttention, on a CPU: vLLM's implementation with a function in the place of its kernel, which
needs a GPU, and our kernel interpreted."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends import flash_attn
from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl

from ntk_attention import PrefixState, Rotation, ntk_attention
from ntk_attention.ops.features import feature_map
from ntk_attention.ops.rotation import turned
from ntk_attention.vllm.flash import FUNCTION, FlashPrefixAttention, WithLse, ask_for_lse
from ntk_attention.vllm.slots import LayerStates, Share, Slots, weights
from ntk_attention.vllm.step import RotaryTable

H, H_KV, D, BLOCK, SCALE = 4, 2, 32, 16, 0.2
LENGTHS, QUERIES = [21, 40, 7, 33, 30], [21, 3, 1, 1, 12]  # of five texts, and how many of their tokens are new
SLOTS = [0, 1, -1, 2, 0]  # free, rotary, the base model, LoRA, free
PLAIN: dict[str, Any] = {  # what vLLM's constructor sets, which asks for a GPU
    **{"num_heads": H, "num_kv_heads": H_KV, "head_size": D, "scale": SCALE, "attn_type": AttentionType.DECODER},
    **{"alibi_slopes": None, "sliding_window": (-1, -1), "kv_cache_dtype": "auto", "logits_soft_cap": 0, "sinks": None},
    **{"vllm_flash_attn_version": 3, "fa4_hd256": False, "supports_quant_query_input": False, "dcp_world_size": 1},
    "batch_invariant_enabled": False,
}


def kernel(*, q: Tensor, k: Tensor, v: Tensor, out: Tensor, return_softmax_lse: bool = False, **given: Any) -> Any:
    """What FlashAttention computes of paged keys and values, each score written out."""
    assert given["causal"] is True
    starts, lse = given["cu_seqlens_q"].tolist(), torch.empty(H, len(q))
    for i, length in enumerate(given["seqused_k"].tolist()):
        own = slice(starts[i], starts[i + 1])
        keys, values = (x[given["block_table"][i]].flatten(0, 1)[:length].float() for x in (k, v))
        keys, values = (x.repeat_interleave(H // H_KV, dim=1) for x in (keys, values))
        logits = torch.einsum("lhd,shd->hls", q[own].float(), keys) * given["softmax_scale"]
        n = logits.shape[1]
        hidden = torch.ones(n, length, dtype=torch.bool).triu(length - n + 1)
        logits = logits.masked_fill(hidden, -math.inf)
        lse[:, own] = logits.logsumexp(-1)
        out[own] = torch.einsum("hls,shd->lhd", logits.softmax(-1), values).to(out.dtype)
    return (out, lse) if return_softmax_lse else out


@pytest.fixture
def states(monkeypatch: pytest.MonkeyPatch) -> list[PrefixState]:
    monkeypatch.setattr(flash_attn, FUNCTION, kernel, raising=False)
    monkeypatch.setattr(flash_attn.current_platform, "is_xpu", lambda: False)
    torch.manual_seed(0)
    phi = feature_map("elu", constant=True)
    return [PrefixState(torch.randn(H, D + 1, D), torch.rand(H, D + 1) + 0.1, torch.randn(H), phi) for _ in range(2)]


def made(states: list[PrefixState], rows: Tensor, rotary: RotaryTable) -> FlashPrefixAttention:
    meta = SimpleNamespace(no_lora_flag_cpu=torch.tensor([bool((rows == -1).all())]))
    slots = Slots(3, SimpleNamespace(token_mapping_meta=meta, _token_lora_indices=rows.long()), torch.device("cpu"))
    layer = LayerStates(slots, H, D, torch.bfloat16)
    for place, (state, is_free) in enumerate(zip(states, (True, False), strict=True)):
        packed = weights("layer", state, is_free, Share(0, H, H))
        layer.set_lora(place, packed.lora_a, packed.lora_b)
    plain = object.__new__(FlashAttentionImpl)
    vars(plain).update(PLAIN)
    ask_for_lse()
    return FlashPrefixAttention.of(plain, layer, rotary)  # type: ignore[return-value]


def inputs() -> tuple[Tensor, Tensor, Any]:
    """Queries [T, H, D], a cache as vLLM lays it out, and the metadata."""
    torch.manual_seed(1)
    blocks = [math.ceil(length / BLOCK) for length in LENGTHS]
    table = torch.zeros(len(LENGTHS), max(blocks), dtype=torch.int32)
    order = torch.randperm(sum(blocks)).int()
    for i, count in enumerate(blocks):
        table[i, :count] = order[sum(blocks[:i]) : sum(blocks[: i + 1])]
    cache = torch.randn(sum(blocks), H_KV, BLOCK, 2 * D).bfloat16()
    starts = torch.tensor([0, *QUERIES]).cumsum(0).int()
    metadata = SimpleNamespace(num_actual_tokens=sum(QUERIES), query_start_loc=starts, block_table=table, causal=True)
    metadata.seq_lens = torch.tensor(LENGTHS, dtype=torch.int32)
    metadata.max_query_len, metadata.max_seq_len, metadata.max_num_splits = max(QUERIES), max(LENGTHS), 0
    metadata.scheduler_metadata = metadata.mm_prefix_query_range_tensor = metadata.rswa_prefix_lens = None
    return torch.randn(sum(QUERIES), H, D).bfloat16(), cache, metadata


def test_a_mixed_batch(states: list[PrefixState]) -> None:
    """Against the operation of the library, text by text; tokens behind the batch stay as they are."""
    cos_sin = torch.randn(64, D // 2).mul(9).frac().mul(math.pi)
    embedding = SimpleNamespace(cos_sin_cache=torch.cat([cos_sin.cos(), cos_sin.sin()], -1), is_neox_style=True)
    rotary = RotaryTable(embedding)  # type: ignore[arg-type]
    rows = torch.tensor(SLOTS).repeat_interleave(torch.tensor(QUERIES)).int()
    query, cache, metadata = inputs()
    padded = torch.cat([query, torch.zeros(3, H, D).bfloat16()])
    output = torch.full_like(padded, 7.0)
    scale = torch.ones(())
    layer = SimpleNamespace(_q_scale=scale, _k_scale=scale, _v_scale=scale)
    attention = made(states, rows, rotary)
    attention.forward(layer, padded, None, None, cache, metadata, output=output, output_scale=None)
    assert (output[len(query) :] == 7.0).all()
    for i, (length, n, slot) in enumerate(zip(LENGTHS, QUERIES, SLOTS, strict=True)):
        own = slice(sum(QUERIES[:i]), sum(QUERIES[: i + 1]))
        blocks = cache[metadata.block_table[i].long()].transpose(1, 2).flatten(0, 1)[:length]
        keys, values = (x.transpose(0, 1)[None].float() for x in blocks.split(D, dim=-1))
        q = query[own].transpose(0, 1)[None].float()
        mask = torch.ones(n, length, dtype=torch.bool).tril(length - n)
        if slot in (0, 1):
            angles = cos_sin[None, length - n : length]
            rotation = Rotation.of(angles.cos(), angles.sin()) if slot == 0 else None
            expected = ntk_attention(
                q, keys, values, states[slot], attn_mask=mask, scale=SCALE, enable_gqa=True, rotation=rotation
            )
        else:
            expected = torch.nn.functional.scaled_dot_product_attention(
                q, keys, values, attn_mask=mask, scale=SCALE, enable_gqa=True
            )
        torch.testing.assert_close(output[own].transpose(0, 1)[None].float(), expected, atol=3e-2, rtol=3e-2)


def test_no_adapter_is_plain(states: list[PrefixState]) -> None:
    """Not one bit changes, and nobody asks for the log-sum-exp."""
    rows = torch.full((sum(QUERIES),), -1, dtype=torch.int32)
    query, cache, metadata = inputs()
    attention = made(states, rows, None)  # type: ignore[arg-type]
    scale = torch.ones(())
    layer = SimpleNamespace(_q_scale=scale, _k_scale=scale, _v_scale=scale)
    found, expected = torch.empty_like(query), torch.empty_like(query)
    attention.forward(layer, query, None, None, cache, metadata, output=found)
    FlashAttentionImpl.forward(attention, layer, query, None, None, cache, metadata, expected)
    assert torch.equal(found, expected)
    assert "ntk_attention_step" not in vars(metadata)


def test_the_function_is_wrapped_once(states: list[PrefixState]) -> None:
    ask_for_lse()
    ask_for_lse()
    function = getattr(flash_attn, FUNCTION)
    assert isinstance(function, WithLse)
    assert function.original is kernel


def test_rotations_in_a_step_are_those_of_the_positions() -> None:
    """What `RotaryTable` undoes is what the embedding does, and the last row undoes nothing."""
    angles = torch.rand(10, 4)
    embedding = SimpleNamespace(cos_sin_cache=torch.cat([angles.cos(), angles.sin()], -1), is_neox_style=False)
    rotary = RotaryTable(embedding)  # type: ignore[arg-type]
    x = torch.randn(1, 2, 10, 8)
    rotation = Rotation.of(angles.cos()[None], angles.sin()[None], width=2)
    turned_x = turned(x, rotation, forward=True)
    table = Rotation(rotary.table[:10][None], rotary.width)
    torch.testing.assert_close(turned(turned_x, table, forward=False), x)
    nothing = Rotation(rotary.table[[rotary.last] * 10][None], rotary.width)
    torch.testing.assert_close(turned(x, nothing, forward=False), x)
