"""The methods by name: how each adapts a model, and the learning rates that are tried.

Equal parameters: unless its name says another size, a method has as many trainable parameters as NTK-Attention with a
full Z in every query head, within 5 %. Full fine-tuning, IA3, the head alone and prefixes of a given m have their own,
and zero-shot trains nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from ntk_attention.calibration.settings import CalibrationSettings

from . import budgets
from .method import Method
from .opponents import full, head_only, ia3, lora, oft, pissa, prefix, prefix_memory, rank_stabilised, zero_shot
from .ours import (
    ATTENTION_ALONE,
    ntk,
    ntk_divided,
    ntk_neutral,
    ntk_published,
    ntk_scale_only,
    ntk_whitening_only,
    ntk_without_normaliser,
)
from .tasks import Task

HALF = CalibrationSettings(share=0.5)
NTK_RATES = (1e-3, 3e-3, 1e-2, 3e-2)
LORA_RATES = (3e-4, 1e-3, 3e-3, 1e-2)
PREFIX_RATES = (3e-3, 1e-2, 3e-2, 1e-1)
RANKS, LENGTHS = (2, 8), (1, 10, 100)
at_ours, at_kv = budgets.ours, partial(budgets.ours, heads="kv")
at_quarter, at_4x = partial(budgets.ours, size=1 / 4), partial(budgets.ours, size=4.0)
qv, attention, mlp = budgets.QUERY_VALUE, budgets.ATTENTION, budgets.FEED_FORWARD
LOW_RATES = (1e-4, 3e-4, 1e-3, 3e-3)  # where the product of LoRA's factors counts for more


def encodes(task: Task) -> bool:
    return task.has_head


def sees_pictures(task: Task) -> bool:
    return task.sees_pictures


def writes_text(task: Task) -> bool:
    return not task.has_head


def has_large_heads(task: Task) -> bool:
    return task.model == "gemma3-270m"


has_groups = writes_text  # fewer KV heads than query heads: only the language models here


def ablation(label: str, question: str, build: Callable[..., nn.Module] = ntk, **options: Any) -> Method:
    only = options.pop("only", lambda task: True)
    return Method(label, "ntk", 4, partial(build, **options) if options else build, NTK_RATES, question, only)


def steps(label: str, **settings: float) -> Method:
    return ablation(label, "steps", settings=CalibrationSettings(**settings))


METHODS: dict[str, Method] = {
    "ntk": Method("NTK-Attention", "ntk", 0, ntk, NTK_RATES),
    "lora-attention": Method(
        "LoRA, attention", "lora", 0, partial(lora, budget=at_ours, pattern=attention), LORA_RATES
    ),
    "prefix": Method("prefix, equal size", "prefix", 0, prefix, PREFIX_RATES),
    "ntk-published": Method("NTK-Attention as published", "ntk", 1, ntk_published, (1e-4, 3e-4, 1e-3, 3e-3)),
    "lora-all": Method("LoRA, all linear", "lora", 1, partial(lora, budget=at_ours), LORA_RATES),
    "lora-qv": Method("LoRA, q and v", "lora", 1, partial(lora, budget=at_ours, pattern=qv), LORA_RATES),
    "prefix-text": Method("prefix, equal size, from text", "prefix", 1, partial(prefix, from_text=True), PREFIX_RATES),
    "prefix-memory": Method("softmax + phi(q) M", "prefix", 1, prefix_memory, (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)),
    "full": Method("full fine-tuning", "other", 1, full, (1e-5, 3e-5, 1e-4, 3e-4)),
    "head": Method("head only", "other", 1, head_only, (1e-3, 3e-3, 1e-2, 3e-2), only=encodes),
    "zero-shot": Method("the base model", "other", 1, zero_shot, (), only=writes_text),
    "dora": Method(
        "DoRA, attention", "lora", 2, partial(lora, budget=at_ours, pattern=attention, dora=True), LORA_RATES
    ),
    "lora-mlp": Method("LoRA, MLP", "lora", 1, partial(lora, budget=at_ours, pattern=mlp), LORA_RATES),
    "dora-mlp": Method("DoRA, MLP", "lora", 2, partial(lora, budget=at_ours, pattern=mlp, dora=True), LORA_RATES),
    "rslora-all": Method(
        "rank-stabilised LoRA, all linear", "lora", 2, partial(rank_stabilised, budget=at_ours), LOW_RATES
    ),
    "pissa-mlp": Method("PiSSA, MLP", "lora", 2, partial(pissa, budget=at_ours, pattern=mlp), LOW_RATES),
    "pissa-all": Method("PiSSA, all linear", "lora", 2, partial(pissa, budget=at_ours), LOW_RATES),
    "oft": Method("OFT, all linear", "other", 2, partial(oft, budget=at_ours), LORA_RATES),
    "ia3": Method("IA3", "other", 2, ia3, (1e-3, 3e-3, 1e-2, 3e-2)),
    "ntk-kv": Method(
        "NTK-Attention, per KV head", "ntk", 2, partial(ntk, state_heads="kv"), NTK_RATES, only=has_groups
    ),
    "lora-attention-kv": Method(
        "LoRA, attention, size of per KV head", "lora", 2, partial(lora, budget=at_kv, pattern=attention), LORA_RATES,
        only=has_groups,
    ),
    **{f"prefix-{m}": Method(f"prefix, m = {m}", "prefix", 3, partial(prefix, m=m), PREFIX_RATES) for m in LENGTHS},
    "ntk-quarter": Method(
        "NTK-Attention, a quarter of the size", "ntk", 3, partial(ntk_divided, size=1 / 4), NTK_RATES
    ),
    "lora-attention-quarter": Method(
        "LoRA, attention, a quarter of the size", "lora", 3, partial(lora, budget=at_quarter, pattern=attention),
        LORA_RATES,
    ),
    "ntk-4x": Method("NTK-Attention, four times the size", "ntk", 3, partial(ntk_divided, size=4.0), NTK_RATES),
    "lora-all-4x": Method(
        "LoRA, all linear, four times the size", "lora", 3, partial(lora, budget=at_4x), LORA_RATES
    ),
    "lora-mlp-quarter": Method(
        "LoRA, MLP, a quarter of the size", "lora", 3, partial(lora, budget=at_quarter, pattern=mlp), LORA_RATES
    ),
    "lora-mlp-4x": Method(
        "LoRA, MLP, four times the size", "lora", 3, partial(lora, budget=at_4x, pattern=mlp), LORA_RATES
    ),
    "outputs-1": steps("steps of blocks' outputs a third", output_step=1.0),
    "outputs-third": steps("steps of blocks' outputs a ninth", output_step=1 / 3),
    "calm-heads": steps("steps of blocks' outputs and of Z a third", output_step=1.0, head_step=1 / 3),
    "calmer-heads": steps("steps of blocks' outputs a third, of Z a tenth", output_step=1.0, head_step=1 / 10),
    "calm-inputs": steps("steps of blocks' outputs a third, of their inputs a tenth", output_step=1.0, input_step=24.0),
    "calm-normaliser": steps("steps of blocks' outputs and of log k a third", output_step=1.0, log_k_step=0.05),
    "beside-blocks": ablation(
        "x^T Z beside the blocks, its steps a third", "feed-forward blocks", feed_forward="beside",
        settings=CalibrationSettings(output_step=1.0),
    ),
    # The unit of log k is its step over the share: these have that of the default, 0.3.
    **{
        f"calm-share-{s}": ablation(
            f"prefix holds {s} % at the start, steps of log k as far", "share",
            settings=CalibrationSettings(share=s / 100, log_k_step=0.3 * s / 100),
        )
        for s in (5, 15, 25)
    },
    "attention-alone": ablation(
        "attention alone, half of it at the start", "feed-forward blocks", settings=HALF, **ATTENTION_ALONE
    ),
    "attention-15": ablation(
        "attention alone, 15 % at the start", "feed-forward blocks", settings=CalibrationSettings(share=0.15),
        **ATTENTION_ALONE,
        only=writes_text,  # the default of encoders
    ),
    "with-blocks": ablation(
        "as language models: blocks too, half of the attention at the start, even steps", "feed-forward blocks",
        ntk_divided, part=1 / 4, settings=CalibrationSettings(share=0.5, last_picture_step=1.0),
        only=encodes,  # elsewhere the default
    ),
    "as-small-heads": ablation(
        "half of the attention at the start and the steps of small heads", "large heads",
        settings=CalibrationSettings(large_head_dim=None), only=has_large_heads,
    ),
    "rotary": ablation("phi sees rotated queries", "positions", positions="rotary", only=writes_text),
    "rotary-alone": ablation(
        "attention alone, phi sees rotated queries", "positions", settings=HALF, positions="rotary", **ATTENTION_ALONE,
        only=writes_text,
    ),
    "even-steps": ablation(
        "the same steps in all layers", "steps", settings=CalibrationSettings(last_picture_step=1.0), only=sees_pictures
    ),
    "half-in-blocks": ablation(
        "rank d / 4, half of the size in blocks", "feed-forward blocks", ntk_divided, part=1 / 2
    ),
    **{
        f"rank-{s}": ablation(f"attention alone, rank {s}", "rank of Z", rank=s, feed_forward_rank=None) for s in RANKS
    },
    "start-neutral": ablation("neutral start, not calibrated", "start", ntk_neutral),
    "start-scale": ablation("scale only", "start", ntk_scale_only),
    "start-whitening": ablation("whitening only", "start", ntk_whitening_only),
    "no-normaliser": ablation("without the normaliser k", "normaliser", ntk_without_normaliser),
    **{
        f"random-{r}": ablation(
            f"positive random features, r = {r}", "feature map and r", feature_map="positive_random",
            feature_map_options={"num_features": r, "seed": 0},
        )
        for r in (16, 64, 256)
    },
    "taylor": ablation(
        "Taylor features of degree 2", "feature map and r", feature_map="taylor", feature_map_options={"degree": 2},
        only=encodes,  # r = 561 with d = 32, 2,145 with d = 64
    ),
    "data-unrelated": ablation("calibrated on unrelated data", "calibration data", source="unrelated"),
    "data-noise": ablation("calibrated on random inputs", "calibration data", source="noise"),
    "data-alone": ablation(
        "calibrated on training data alone", "calibration data", others="none", **ATTENTION_ALONE,
        only=writes_text,  # the default of encoders
    ),
    "others-random": ablation(
        "coordinates see random tokens beside the task", "calibration data", others="random", **ATTENTION_ALONE
    ),
    "share-5": ablation("prefix holds 5 % at the start", "share", settings=CalibrationSettings(share=0.05)),
    "share-15": ablation(
        "prefix holds 15 % at the start", "share", settings=CalibrationSettings(share=0.15), only=writes_text
    ),
}  # fmt: skip
