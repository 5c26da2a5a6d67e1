"""How an adapter should start: arms of the calibration against each other and against LoRA, at equal parameters.

Writes one JSON line per arm. Example, on one GPU:

    python -m experiments.calibration_start --arms arms.json --data DIR --model FOLDER --out results.jsonl

DIR holds train.jsonl, valid.jsonl and test.jsonl (made by `python -m experiments.calibration_start --make-data DIR`).
"""

import argparse
import json
import math
import platform
import time
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import ntk_attention.calibration as calibration
from ntk_attention import NTKAttentionConfig, calibrate
from ntk_attention.layer import PrefixAdapter
from ntk_attention.data import EMBEDDED_TASKS, Item, collate, encode_all, is_correct, render_prompt


def make_data(folder: Path, task: str) -> None:
    for name, size, seed in (("train", 13_000, 1), ("valid", 256, 1_000_003), ("test", 1_000, 2_000_003)):
        items = EMBEDDED_TASKS[task](size, seed)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(vars(i)) + "\n" for i in items))


def read(path: Path) -> list[Item]:
    return [Item(**json.loads(line)) for line in path.read_text().splitlines()]


@torch.no_grad()
def mean_loss(model, rows, pad):
    model.eval()
    total = count = 0
    for i in range(0, len(rows), 64):
        batch = {k: v.cuda() for k, v in collate(rows[i : i + 64], pad).items()}
        n = (batch["labels"][:, 1:] != -100).sum().item()
        total += model(**batch).loss.item() * n
        count += n
    return total / count


@torch.no_grad()
def log_probabilities(model, rows, pad):
    """Of the completion tokens: what the start of an adapter changes is measured against the frozen model's."""
    model.eval()
    out = []
    for i in range(0, len(rows), 64):
        batch = {k: v.cuda() for k, v in collate(rows[i : i + 64], pad).items()}
        counted = batch.pop("labels")[:, 1:] != -100
        out.append(torch.log_softmax(model(**batch).logits[:, :-1][counted].float(), dim=-1).cpu())
    return torch.cat(out)


@torch.no_grad()
def start_at_mean_output(model):
    """The start measured before: the prefix's value is the head's mean output, whatever the query."""
    for module in model.modules():
        if isinstance(module, PrefixAdapter):
            module.Z[:, :-1] = 0.0


@torch.no_grad()
def accuracy(model, tokenizer, items, max_new_tokens):
    model.eval()
    tokenizer.padding_side = "left"
    correct = 0
    for i in range(0, len(items), 250):
        part = items[i : i + 250]
        prompts = [render_prompt(item.prompt, tokenizer) for item in part]
        batch = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False).to("cuda")
        out = model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False)
        texts = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        correct += sum(is_correct(text, item.completion) for text, item in zip(texts, part, strict=True))
    return correct / len(items)


def run(arm: dict, args) -> dict:
    torch.manual_seed(arm.get("seed", 0))
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16).cuda()
    train, valid, test = (read(Path(args.data) / f"{n}.jsonl") for n in ("train", "valid", "test"))
    train_rows, valid_rows = (encode_all(items, tokenizer, 1024) for items in (train, valid))
    pad = tokenizer.pad_token_id
    frozen_loss = mean_loss(model, valid_rows, pad)
    frozen = log_probabilities(model, valid_rows, pad)
    started = time.time()
    if arm["method"] == "lora":
        config = LoraConfig(r=arm["r"], lora_alpha=2 * arm["r"], target_modules=arm["target"], task_type="CAUSAL_LM")
        model = get_peft_model(model, config)
    elif arm["method"] == "ntk":
        model = get_peft_model(model, NTKAttentionConfig(task_type="CAUSAL_LM", **arm.get("config", {})))
        for name, value in arm.get("constants", {}).items():
            setattr(calibration, name, value)
        if arm.get("calibrate", True):
            rows = train_rows[-128:]
            batches = [collate(rows[i : i + 32], pad) for i in range(0, 128, 32)]
            calibrate(model, batches, **arm.get("options", {}))
            if arm.get("start") == "mean":
                start_at_mean_output(model)
    start_loss = mean_loss(model, valid_rows, pad)
    start = log_probabilities(model, valid_rows, pad)
    start_kl = (frozen.exp() * (frozen - start)).sum(dim=-1).mean().item()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=arm["lr"], weight_decay=0.0)
    steps, batch_size = args.steps, args.batch_size
    curve = []
    order = torch.randperm(len(train_rows), generator=torch.Generator().manual_seed(arm.get("seed", 0))).tolist()
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = arm["lr"] * min(1.0, (step + 1) / 20) * (1 - step / steps)
        rows = [train_rows[i] for i in order[step * batch_size : (step + 1) * batch_size]]
        batch = {k: v.cuda() for k, v in collate(rows, pad).items()}
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 20 == 19:
            curve.append(round(loss.item(), 4))
    valid_loss = mean_loss(model, valid_rows, pad) if math.isfinite(loss.item()) else float("nan")
    return {
        **arm, "task": args.task, "trainable": sum(p.numel() for p in parameters), "frozen_loss": frozen_loss,
        "start_loss": start_loss, "start_kl": start_kl, "valid_loss": valid_loss, "accuracy": accuracy(model, tokenizer, test, args.max_new_tokens),
        "curve": curve, "steps": steps, "batch_size": batch_size, "seconds": time.time() - started, "torch": torch.__version__,
        "transformers": transformers.__version__, "gpu": torch.cuda.get_device_name(), "python": platform.python_version(),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--make-data", type=Path)
    parser.add_argument("--task", default="gsm-symbolic", choices=sorted(EMBEDDED_TASKS))
    parser.add_argument("--arms", type=Path)
    parser.add_argument("--part", default="0/1", help="i/n: every n-th arm from i on, to share a GPU")
    parser.add_argument("--data")
    parser.add_argument("--model")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-new-tokens", type=int, default=12)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.make_data:
        return make_data(args.make_data, args.task)
    index, parts = map(int, args.part.split("/"))
    for arm in json.loads(args.arms.read_text())[index::parts]:
        try:
            result = run(arm, args)
        except Exception as error:
            result = {**arm, "error": repr(error)[:500]}
        with args.out.open("a") as f:
            f.write(json.dumps(result) + "\n")
        print({k: v for k, v in result.items() if k not in ("curve", "torch", "transformers", "gpu", "python")}, flush=True)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
