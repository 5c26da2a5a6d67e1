"""PEFT prefix-tuning adapters of m tokens, trained on a task and converted: the task's metric before and after.

The field exact_match of a row is the share of the answers whose final number is right.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from transformers import DynamicCache

from ntk_attention import NTKAttentionConfig
from ntk_attention.cli.data import EMBEDDED_TASKS, collate, encode_all
from ntk_attention.cli.evaluation import mean_loss, share_right
from ntk_attention.cli.models import load_model
from ntk_attention.convert import adapter_from_prefix, anchor, by_layer, distill, fit, prefix_of_adapter

from .methods import ANCHORED, R256, TAYLOR
from .rows import Rows

TOKENS = (32, 256, 2048)
MAX_NEW_TOKENS = 12


def run(
    out: Path,
    work: Path,
    tokens: Sequence[int],
    *,
    model: str,
    task: str,
    train_steps: int,
    batch_size: int,
    train_rates: Sequence[float],
    calibration_batches: int,
    steps: int,
    learning_rate: float,
    held_out: int,
    seed: int,
) -> None:
    """One row per m and way; those that stand in the folder are skipped, trained adapters are kept in `work`."""
    written = Rows(out / "prefix_tuning.jsonl")
    sizes = {"model": model, "task": task, "train_steps": train_steps, "batch_size": batch_size, "steps": steps,
             "calibration_batches": calibration_batches, "held_out": held_out, "seed": seed}  # fmt: skip
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base: Any
    base, tokenizer = load_model(model)
    base.to(device).eval().requires_grad_(False)
    pad = tokenizer.pad_token_id
    train_items = EMBEDDED_TASKS[task](train_steps * batch_size, seed)
    seen = {item.prompt for item in train_items}
    others = {item.prompt: item for item in EMBEDDED_TASKS[task](8 * held_out, seed + 10**6) if item.prompt not in seen}
    test, valid = list(others.values())[:held_out], list(others.values())[held_out : held_out + 64]
    rows, valid_rows, test_rows = (encode_all(items, tokenizer, 2048) for items in (train_items, valid, test))
    parts = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]

    def add(m: int, way: str, model: Any, **more: Any) -> None:
        started = time.time()
        figures = {
            "loss": mean_loss(model, test_rows, pad),
            "exact_match": share_right(model, tokenizer, test, "final_number", MAX_NEW_TOKENS),
            "evaluated_in_seconds": round(time.time() - started, 1),
        }
        written.add({"m": m, "method": way, **sizes, **figures, **more})

    def missing(m: int, way: str) -> bool:
        return not written.has({"m": m, "method": way, **sizes})

    if missing(0, "base"):
        add(0, "base", base)
    ways: dict[str, Callable[..., Any]] = {
        "direct elu": partial(convert_directly, config={"feature_map": "elu"}),
        "direct taylor 2": partial(convert_directly, config=TAYLOR),
        "fitted elu": partial(convert, config={}),
        "distilled elu": partial(convert, config={}, distils=True),
        "fitted anchored 63": partial(convert, config=ANCHORED),
        "distilled anchored 63": partial(convert, config=ANCHORED, distils=True),
        "fitted random 256": partial(convert, config=R256),
        "distilled random 256": partial(convert, config=R256, distils=True),
    }
    for m in tokens:
        wanted = [way for way in ("tuned", *ways) if missing(m, way)]
        if not wanted:
            continue
        folder = work / f"{task}-m{m}-steps{train_steps}-seed{seed}"
        if not (folder / "adapter_config.json").exists():
            best = min(
                (train(base, tokenizer, m, parts, valid_rows, rate, seed) for rate in train_rates),
                key=lambda result: result[0],
            )
            keep_tuned(base, m, best, folder)
        tuned = PeftModel.from_pretrained(base, folder).eval()
        if "tuned" in wanted:
            add(m, "tuned", tuned, train_rates=list(train_rates))
        with torch.no_grad():
            prefix = prefix_of_adapter(tuned)
        batches = []
        for part in parts[:calibration_batches]:
            batch = {k: v.to(device) for k, v in collate(part, pad).items() if k != "labels"}
            batches.append(batch)
        for way in wanted:
            if way == "tuned":
                continue
            started = time.time()
            converted = ways[way](base, prefix, batches, steps, learning_rate, seed)
            add(m, way, converted, seconds=round(time.time() - started, 1), learning_rate=learning_rate)
            converted.unload()


def convert_directly(base: Any, prefix: list, batches: list, steps: int, rate: float, seed: int, config: dict) -> Any:
    return adapter_from_prefix(base, prefix, NTKAttentionConfig(task_type="CAUSAL_LM", **config)).eval()


def convert(
    base: Any, prefix: list, batches: list, steps: int, rate: float, seed: int, config: dict, distils: bool = False
) -> Any:
    torch.manual_seed(seed)
    model = get_peft_model(base, NTKAttentionConfig(task_type="CAUSAL_LM", **config).for_given_prefix()).eval()
    named = by_layer(model, prefix)
    if config.get("feature_map") == "anchored":
        anchor(model, named, batches)
    fit(model, named, batches)
    if distils:
        distill(model, named, batches, steps=steps, learning_rate=rate)
    return model


def train(
    base: Any, tokenizer: Any, m: int, parts: list, valid_rows: list, rate: float, seed: int
) -> tuple[float, dict[str, torch.Tensor]]:
    """Validation loss and the trained embedding, which starts as the KV cache of training items, one after another."""
    torch.manual_seed(seed)
    model: Any = get_peft_model(base, PrefixTuningConfig(num_virtual_tokens=m, task_type="CAUSAL_LM"))
    weight = model.prompt_encoder["default"].embedding.weight
    device = next(base.parameters()).device
    ids = [token for part in parts for row in part for token in row["input_ids"]][:m]
    ids = (ids * (m // len(ids) + 1))[:m]
    with torch.no_grad():
        cache = DynamicCache()
        base(input_ids=torch.tensor([ids], device=device), past_key_values=cache, use_cache=True, logits_to_keep=1)
        layers = [x[0].transpose(0, 1).reshape(m, -1) for layer in cache.layers for x in (layer.keys, layer.values)]
        weight.copy_(torch.cat(layers, dim=1))
    optimizer = torch.optim.AdamW([weight], lr=rate, weight_decay=0.0)
    for step, part in enumerate(parts):
        optimizer.param_groups[0]["lr"] = rate * min(1.0, (step + 1) / 20) * (1 - step / len(parts))
        batch = {k: v.to(device) for k, v in collate(part, tokenizer.pad_token_id).items()}
        with torch.autocast(device.type, dtype=base.dtype, enabled=base.dtype != torch.float32):
            loss = model(**batch).loss
        (weight.grad,) = torch.autograd.grad(loss, [weight])
        torch.nn.utils.clip_grad_norm_([weight], 1.0)
        optimizer.step()
    model.eval()
    loss = mean_loss(model, valid_rows, tokenizer.pad_token_id)
    print(f"prefix tuning m={m} learning rate {rate:g}: validation loss {loss:.4f}", flush=True)
    return loss, {"weight": weight.detach().cpu(), "rate": torch.tensor(rate)}


def keep_tuned(base: Any, m: int, best: tuple[float, dict[str, torch.Tensor]], folder: Path) -> None:
    model: Any = get_peft_model(base, PrefixTuningConfig(num_virtual_tokens=m, task_type="CAUSAL_LM"))
    with torch.no_grad():
        model.prompt_encoder["default"].embedding.weight.copy_(best[1]["weight"])
    model.save_pretrained(folder)
