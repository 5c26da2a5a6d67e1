"""PEFT prefix-tuning adapters of m tokens, trained on a task and converted: the task's metric before and after.

The field final_number of a row is the share of the answers whose final number is right.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from transformers import DynamicCache

from ntk_attention import NTKAttentionConfig
from ntk_attention.cli.data import collate
from ntk_attention.cli.encoding import encode_all
from ntk_attention.cli.evaluation import mean_loss, share_right
from ntk_attention.cli.models import load_model
from ntk_attention.cli.tasks import EMBEDDED_TASKS
from ntk_attention.convert import adapter_from_prefix, anchor, by_layer, distill, fit, prefix_of_adapter

from .methods import ANCHORED, R256, TAYLOR
from .rows import Rows

MAX_NEW_TOKENS = 12


@dataclass(frozen=True)
class Setting:
    """What rows depend on beside m and the way.

    Args:
        model: a name or a folder.
        task: of the embedded ones.
        train_steps, batch_size, train_rates: of prefix tuning; the rate that is best on validation items counts.
        calibration_batches: training batches that the conversion learns from.
        steps, learning_rate: of distillation.
        held_out: test items.
        seed: of items and training.
    """

    model: str
    task: str
    train_steps: int
    batch_size: int
    train_rates: tuple[float, ...]
    calibration_batches: int
    steps: int
    learning_rate: float
    held_out: int
    seed: int

    def row(self) -> dict[str, Any]:
        """The settings that a row holds, whatever its way is."""
        return {name: x for name, x in asdict(self).items() if name not in ("train_rates", "learning_rate")}


class Study:
    """The base model, the items, and prefixes trained on them."""

    def __init__(self, setting: Setting, work: Path):
        self.setting, self.work = setting, work
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.base: Any
        self.base, self.tokenizer = load_model(setting.model)
        self.base.to(self.device).eval().requires_grad_(False)
        make, held_out = EMBEDDED_TASKS[setting.task], setting.held_out
        train_items = make(setting.train_steps * setting.batch_size, setting.seed)
        seen = {item.prompt for item in train_items}
        others = {item.prompt: item for item in make(8 * held_out, setting.seed + 10**6) if item.prompt not in seen}
        self.test, valid = list(others.values())[:held_out], list(others.values())[held_out : held_out + 64]
        rows, self.valid_rows, self.test_rows = (
            encode_all(items, self.tokenizer, 2048) for items in (train_items, valid, self.test)
        )
        size = setting.batch_size
        self.parts = [rows[i : i + size] for i in range(0, len(rows), size)]

    @property
    def batches(self) -> list[dict[str, torch.Tensor]]:
        """What the conversion learns from."""
        pad = self.tokenizer.pad_token_id
        collated = (collate(part, pad) for part in self.parts[: self.setting.calibration_batches])
        return [{k: v.to(self.device) for k, v in batch.items() if k != "labels"} for batch in collated]

    def figures(self, model: Any) -> dict[str, float]:
        """On the test items."""
        started = time.time()
        return {
            "loss": mean_loss(model, self.test_rows, self.tokenizer.pad_token_id),
            "final_number": share_right(model, self.tokenizer, self.test, "final_number", MAX_NEW_TOKENS),
            "evaluated_in_seconds": round(time.time() - started, 1),
        }

    def tuned(self, m: int) -> Any:
        """The base model with a prefix of m tokens, trained if the work folder has none."""
        setting = self.setting
        folder = self.work / f"{setting.task}-m{m}-steps{setting.train_steps}-seed{setting.seed}"
        if not (folder / "adapter_config.json").exists():
            results = (
                train(self.base, self.tokenizer, m, self.parts, self.valid_rows, rate, setting.seed)
                for rate in setting.train_rates
            )
            keep_tuned(self.base, m, min(results, key=lambda result: result[0]), folder)
        return PeftModel.from_pretrained(self.base, folder).eval()


def run(out: Path, work: Path, tokens: Sequence[int], setting: Setting) -> None:
    """One row per m and way; those that stand in the folder are skipped, trained adapters are kept in `work`."""
    written = Rows(out / "prefix_tuning.jsonl")
    study = Study(setting, work)

    def missing(m: int, way: str) -> bool:
        return not written.has({"m": m, "method": way, **setting.row()})

    def add(m: int, way: str, model: Any, **more: Any) -> None:
        written.add({"m": m, "method": way, **setting.row(), **study.figures(model), **more})

    if missing(0, "base"):
        add(0, "base", study.base)
    for m in tokens:
        wanted = [way for way in ("tuned", *WAYS) if missing(m, way)]
        if not wanted:
            continue
        tuned = study.tuned(m)
        if "tuned" in wanted:
            add(m, "tuned", tuned, train_rates=list(setting.train_rates))
        with torch.no_grad():
            prefix = prefix_of_adapter(tuned)
        batches = study.batches
        for way in (way for way in wanted if way in WAYS):
            started = time.time()
            converted = WAYS[way](study.base, prefix, batches, setting)
            seconds = round(time.time() - started, 1)
            add(m, way, converted, seconds=seconds, learning_rate=setting.learning_rate)
            converted.unload()


def convert_directly(base: Any, prefix: list, batches: list, setting: Setting, **config: Any) -> Any:
    return adapter_from_prefix(base, prefix, NTKAttentionConfig(task_type="CAUSAL_LM", **config)).eval()


def convert(base: Any, prefix: list, batches: list, setting: Setting, distils: bool = False, **config: Any) -> Any:
    torch.manual_seed(setting.seed)
    model = get_peft_model(base, NTKAttentionConfig(task_type="CAUSAL_LM", **config).for_given_prefix()).eval()
    named = by_layer(model, prefix)
    if config.get("feature_map") == "anchored":
        anchor(model, named, batches)
    fit(model, named, batches)
    if distils:
        distill(model, named, batches, steps=setting.steps, learning_rate=setting.learning_rate)
    return model


WAYS: dict[str, Callable[..., Any]] = {
    "direct elu": partial(convert_directly, feature_map="elu"),
    "direct taylor 2": partial(convert_directly, **TAYLOR),
    "fitted elu": convert,
    "distilled elu": partial(convert, distils=True),
    "fitted anchored 63": partial(convert, **ANCHORED),
    "distilled anchored 63": partial(convert, distils=True, **ANCHORED),
    "fitted random 256": partial(convert, **R256),
    "distilled random 256": partial(convert, distils=True, **R256),
}


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
