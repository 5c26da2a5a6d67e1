"""Attention on a CPU: the keys in vLLM's blocks, and the log-sum-exp that its kernel does not give."""

from types import SimpleNamespace

import pytest
import torch
from vllm import _custom_ops as vllm_ops
from vllm.lora.ops.torch_ops import lora_ops
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

from ntk_attention.vllm.cpu import CPUPrefixAttention, mend_operators
from ntk_attention.vllm.step import Request

H, H_KV, BLOCK = 4, 2, 32


def attention(head_dim: int, window: int = -1, softcap: float = 0.0) -> CPUPrefixAttention:
    made = object.__new__(CPUPrefixAttention)
    vars(made).update(head_size=head_dim, scale=0.3, sliding_window=window, logits_soft_cap=softcap)
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [32, 64, 80, 256])
@pytest.mark.parametrize("block_size", [32, 128])
def test_keys(dtype: torch.dtype, head_dim: int, block_size: int) -> None:
    """Those that vLLM's operator has stored, in the layout of every set of instructions that the machine has."""
    isa = _get_attn_isa(dtype, block_size, head_dim)
    keys, values = torch.randn(2, 3 * block_size, H_KV, head_dim).to(dtype)
    cache = torch.zeros(5, H_KV, block_size, 2 * head_dim, dtype=dtype)
    table = torch.tensor([[0, 0, 0], [4, 1, 2]], dtype=torch.int32)
    slots = (table[1].repeat_interleave(block_size) * block_size + torch.arange(block_size).repeat(3)).long()
    parts = cache.view(5, H_KV, 2 * block_size, head_dim).chunk(2, dim=2)
    vllm_ops.cpu_attn_reshape_and_cache(keys, values, *parts, slots, isa)
    length = 2 * block_size + 7
    found = attention(head_dim).keys(SimpleNamespace(isa=isa), cache, table, Request(1, 0, 0, 1, length))
    assert torch.equal(found, keys[:length].transpose(0, 1))


@pytest.mark.parametrize("window", [-1, 5])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_log_sum_exp(window: int, softcap: float) -> None:
    """Of the last tokens of a text, each sum written out."""
    query, keys = torch.randn(6, H, 32), torch.randn(H_KV, 20, 32)
    found = attention(32, window, softcap).log_sum_exp(query, keys, 14)
    for i, h in ((0, 0), (3, 1), (5, 3)):
        first = 0 if window < 0 else 14 + i - window + 1
        logits = 0.3 * keys[h // 2, first : 14 + i + 1] @ query[i, h]
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        torch.testing.assert_close(found[h, i], logits.exp().sum().log())


def test_base_tokens_pass_lora_operators() -> None:
    mend_operators()
    weights = torch.randn(3, 1, 5, 2)
    inputs, indices = torch.randn(4, 2), torch.tensor([0, -1, 2, -1])
    for output in (torch.zeros(4, 5), torch.zeros(4, 9)):
        whole = output.shape[1] == 5
        if whole:
            lora_ops.bgmv_expand(inputs, weights, output, indices)
        else:
            lora_ops.bgmv_expand_slice(inputs, weights, output, indices, 2, 5)
        part = output if whole else output[:, 2:7]
        torch.testing.assert_close(part[0], weights[0, 0] @ inputs[0])
        torch.testing.assert_close(part[2], weights[2, 0] @ inputs[2])
        assert not output[[1, 3]].any()
