"""How an adapter should start: arms of the calibration against each other (and, where an arm says so, against LoRA).

Writes one JSON line per arm: how far the start is from the frozen model (loss, and KL divergence on the completions of
validation items), and after training the loss and, in the field exact_match, the share of the answers whose final
number is right. An arm is a JSON object: name, method ("ntk" or "lora"), lr, seed, and for "ntk" the options of the
config and of `calibrate`.

    python -m experiments.calibration_start experiments/calibration_arms.json results/calibration_start.jsonl \\
        --steps 60 --batch-size 16 --held-out 120
"""

import json
import platform
import time
from pathlib import Path
from typing import Annotated, Any

import peft
import torch
import transformers
import typer
from peft import LoraConfig, get_peft_model

from ntk_attention import NTKAttentionConfig, calibrate
from ntk_attention.cli.data import EMBEDDED_TASKS, IGNORED, collate, encode_all
from ntk_attention.cli.evaluation import mean_loss, share_right
from ntk_attention.cli.models import EMBEDDED, load_model
from ntk_attention.tuner.observation import evaluating

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HARDWARE = torch.cuda.get_device_name() if DEVICE == "cuda" else f"CPU, {torch.get_num_threads()} threads"
VERSIONS = {m.__name__: m.__version__ for m in (torch, transformers, peft)} | {"python": platform.python_version()}
CALIBRATION_BATCHES, WARMUP_STEPS = 4, 20


@torch.no_grad()
def log_probabilities(model: Any, rows: list, pad: int) -> torch.Tensor:
    """Of the next token at every completion token: [N, vocabulary]."""
    out = []
    with evaluating(model):
        for i in range(0, len(rows), 32):
            batch = {k: v.to(DEVICE) for k, v in collate(rows[i : i + 32], pad).items()}
            counted = batch.pop("labels")[:, 1:] != IGNORED
            out.append(torch.log_softmax(model(**batch).logits[:, :-1][counted].float(), dim=-1).cpu())
    return torch.cat(out)


def make_adapter(arm: dict, model: Any, batches: list[dict]) -> Any:
    if arm["method"] == "lora":
        config = LoraConfig(r=arm["r"], lora_alpha=2 * arm["r"], target_modules=arm["targets"], task_type="CAUSAL_LM")
        return get_peft_model(model, config)
    model = get_peft_model(model, NTKAttentionConfig(task_type="CAUSAL_LM", **arm.get("config", {})))
    if arm.get("calibrate", True):
        calibrate(model, batches, **arm.get("options", {}))
    return model


def train(arm: dict, model: Any, rows: list, pad: int, steps: int, batch_size: int) -> list[float]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=arm["lr"], weight_decay=0.0)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(arm["seed"])).tolist()
    losses = []
    model.train()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = arm["lr"] * min(1.0, (step + 1) / WARMUP_STEPS) * (1 - step / steps)
        chosen = [rows[i] for i in order[step * batch_size : (step + 1) * batch_size]]
        loss = model(**{k: v.to(DEVICE) for k, v in collate(chosen, pad).items()}).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(round(loss.item(), 4))
    return losses


def run(arm: dict, base: str, task: str, steps: int, batch_size: int, held_out: int) -> dict:
    torch.manual_seed(arm["seed"])
    started = time.time()
    model, tokenizer = load_model(base)
    model.to(DEVICE)
    pad = tokenizer.pad_token_id
    train_items = EMBEDDED_TASKS[task](steps * batch_size, 1)
    seen = {item.prompt for item in train_items}
    others = [item for item in EMBEDDED_TASKS[task](4 * held_out, 1_000_003) if item.prompt not in seen]
    valid, test = others[: held_out // 2], others[held_out // 2 : held_out + held_out // 2]
    rows, valid_rows = (encode_all(items, tokenizer, 2048) for items in (train_items, valid))
    frozen_loss, frozen = mean_loss(model, valid_rows, pad), log_probabilities(model, valid_rows, pad)

    batches = [collate(rows[i * batch_size : (i + 1) * batch_size], pad) for i in range(CALIBRATION_BATCHES)]
    model = make_adapter(arm, model, batches)
    start_loss, start = mean_loss(model, valid_rows, pad), log_probabilities(model, valid_rows, pad)
    curve = train(arm, model, rows, pad, steps, batch_size)
    return {
        **arm,
        "task": task,
        "base": base,
        "steps": steps,
        "batch_size": batch_size,
        "trainable": model.get_nb_trainable_parameters()[0],
        "frozen_loss": frozen_loss,
        "start_loss": start_loss,
        "start_kl": (frozen.exp() * (frozen - start)).sum(dim=-1).mean().item(),
        "valid_loss": mean_loss(model, valid_rows, pad),
        "exact_match": share_right(model, tokenizer, test, "final_number"),
        "test_items": len(test),
        "curve": curve,
        "seconds": time.time() - started,
        "hardware": HARDWARE,
        "versions": VERSIONS,
    }


def main(
    arms: Annotated[Path, typer.Argument(help="JSON list of arms.")],
    out: Annotated[Path, typer.Argument(help="JSON lines are appended here; arms that stand there are skipped.")],
    base: str = EMBEDDED,
    task: str = "chain-sum",
    steps: int = 400,
    batch_size: int = 32,
    held_out: int = 500,
) -> None:
    done = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    for arm in json.loads(arms.read_text()):
        wanted = {**arm, "base": base, "task": task, "steps": steps, "batch_size": batch_size}
        if any(all(result.get(k) == v for k, v in wanted.items()) for result in done):
            continue
        result = run(arm, base, task, steps, batch_size, held_out)
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("a") as file:
            file.write(json.dumps(result) + "\n")
        print({k: v for k, v in result.items() if k not in ("curve", "versions")}, flush=True)


if __name__ == "__main__":
    typer.run(main)
