"""Which of torch's attention kernels computes a call."""

from typing import Any

import torch
from torch import Tensor

# What `torch._fused_sdp_choice` returns (torch.nn.attention.SDPBackend)
MATH, FLASH, EFFICIENT, CUDNN = 0, 1, 2, 3


def choose_kernel(
    dropout_p: float, is_causal: bool, scale: float, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None
) -> int:
    """The kernel that torch itself would take, `torch.nn.attention.sdpa_kernel` respected; MATH where it has none.

    With a mask it is always the efficient one: with cuDNN, torch's choice on Hopper, left-padded batches were answered
    wrongly (torch 2.11 on an H100; the cause was not found).
    """
    if query.device.type == "cpu":
        return FLASH
    if attn_mask is not None:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
        params = torch.backends.cuda.SDPAParams(query, key, value, attn_mask, dropout_p, is_causal, False)
        return EFFICIENT if torch.backends.cuda.can_use_efficient_attention(params) else MATH
    compiling = torch.compiler.is_compiling()
    kind = None if compiling else kind_of_call(dropout_p, is_causal, query, key, value)
    choice = CHOICES.get(kind)
    if choice is None:
        try:
            choice = torch._fused_sdp_choice(
                query, key, value, None, dropout_p, is_causal, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
            )
        except RuntimeError:  # none of those that sdpa_kernel allows
            choice = MATH
        choice = choice if choice in (FLASH, EFFICIENT, CUDNN) else MATH
        if kind is not None:
            if len(CHOICES) >= MAX_CHOICES:
                CHOICES.clear()
            CHOICES[kind] = choice
    return choice


CHOICES: dict[Any, int] = {}
MAX_CHOICES = 4096


def kind_of_call(dropout_p: float, is_causal: bool, query: Tensor, key: Tensor, value: Tensor) -> tuple[Any, ...]:
    """All that torch's choice of a kernel depends on for inputs without a mask, which kernels the user allows among
    them: asking torch takes longer than a short kernel."""
    inputs = (query, key, value)
    needs_grad = torch.is_grad_enabled() and any([x.requires_grad for x in inputs])
    allowed = tuple(
        [
            torch._C._get_flash_sdp_enabled(),
            torch._C._get_mem_efficient_sdp_enabled(),
            torch._C._get_cudnn_sdp_enabled(),
            torch._C._get_math_sdp_enabled(),
            torch.are_deterministic_algorithms_enabled(),
            tuple(torch._C._get_sdp_priority_order()),
        ]
    )
    sizes = tuple([(x.shape, x.stride()) for x in inputs])
    return dropout_p, is_causal, needs_grad, query.dtype, query.device, allowed, sizes
