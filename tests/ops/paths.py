"""Which path a call takes, and what makes it take another one."""

import math

from ntk_attention.ops import plan
from ntk_attention.ops.bundles import Prefixes, StateTensors, Tokens
from ntk_attention.ops.plan import Path, plan_attention
from ntk_attention.ops.triton import support


def path_of(query, key, value, state, attn_mask=None, *, is_causal=False, rotation=None, backend="auto"):
    tokens = Tokens(query, key, value, attn_mask, is_causal=is_causal)
    return plan_attention(tokens, Prefixes([state], 1.0, rotation=rotation), backend=backend)


def has_kernels(query, value):
    return support.covers(query.device, query.dtype, query.shape[-1], value.shape[-1])


def merge_always(monkeypatch):
    """Let "auto" take the library's kernel and merge the prefix, at any length."""
    monkeypatch.setattr(plan, "MERGE_FROM", ((256, 0),))
    monkeypatch.setattr(plan, "PATHS", {})


def without_hopper(monkeypatch):
    monkeypatch.setattr(support, "forward_sm90", None)
    monkeypatch.setattr(plan, "PATHS", {})


def flat(inputs, index=None, W=None, rotation=None, *, is_causal=True, constant=True, scale=32**-0.5):
    """The arguments of the custom operators, but for the path."""
    query, key, value, *state = inputs
    tokens = Tokens(query, key, value, is_causal=is_causal, scale=scale)
    table, width, start = rotation or (None, 0, 0)
    return *tokens, *StateTensors(*state, index, W, table, constant, math.sqrt(scale), width, start)


def paths(query, value):
    """Those that custom operators take for these inputs with a full state."""
    if has_kernels(query, value):
        return [Path.MERGED.value, Path.FUSED.value]
    return [Path.MERGED_TORCH.value]
