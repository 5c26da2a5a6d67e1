"""Whether what an adapter has learned holds at other positions: phi that sees queries with and without theirs.

An adapter trains as on every language task, at the positions from 0 on. Then the validation data are read at positions
that all are larger by the same number, and behind padding that has positions of its own. The base model, whose
attention knows differences of positions alone, says the same there but for rounding.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ntk_attention.cli.data import IGNORED, collate
from ntk_attention.cli.data import Row as Tokens
from ntk_attention.tuner.distributed import device_of
from ntk_attention.tuner.observation import evaluating
from research.recording import Row

from .document import Block, Heading, Table, Text
from .language import PAD_TO
from .tasks import Batch

STAGE = "positions"
ROWS = "positions.jsonl"
TASKS = ("gsm-worked", "chain-sum")  # the longer one first, where runs go side by side
RATES = (3e-3, 1e-2)
# Methods: what of the model has a prefix, and what phi sees of a query.
VARIANTS = {
    "attention-alone": ("attention alone", "free"),
    "rotary-alone": ("attention alone", "rotary"),
    "ntk": ("default", "free"),
    "rotary": ("default", "rotary"),
}
SHIFTS = (0, 256, 1024, 4096)
PADDING = 37  # tokens
BATCH = 16
ABOUT = (
    "Made by `python -m research positions` from `positions.jsonl`. Loss on validation data, nats per token, mean over "
    "the seeds, with all positions larger by a number after training at those from 0 on, and behind "
    f"{PADDING} tokens of padding which positions count."
)


def measured(base: nn.Module, model: nn.Module, examples: Sequence[tuple[Tokens, Any]], pad_token_id: int) -> Row:
    """What a row holds: the losses of the trained model, and beside them those of the base model."""
    rows = [row for row, _ in examples]
    batches = [collate(rows[i : i + BATCH], pad_token_id, PAD_TO) for i in range(0, len(rows), BATCH)]
    own = losses(model, batches, pad_token_id)
    return {"validation": {"loss": own["shifted"]["0"]}, **own, "base": losses(base, batches, pad_token_id)}


def losses(model: nn.Module, batches: Sequence[Batch], pad_token_id: int) -> Row:
    found = {str(shift): mean_loss(model, [shifted(batch, shift) for batch in batches]) for shift in SHIFTS}
    padded = mean_loss(model, [left_padded(batch, PADDING, pad_token_id) for batch in batches])
    return {"shifted": found, "left_padded": padded}


def shifted(batch: Batch, shift: int) -> Batch:
    positions = torch.arange(shift, shift + batch["input_ids"].shape[1])
    return {**batch, "position_ids": positions.expand_as(batch["input_ids"])}


def left_padded(batch: Batch, count: int, pad_token_id: int) -> Batch:
    """Without `position_ids`: a model then counts the padding, too."""
    fill = {"input_ids": pad_token_id, "attention_mask": 0, "labels": IGNORED}
    padded = {name: F.pad(x, (count, 0), value=fill[name]) for name, x in batch.items()}
    padded["labels"][:, count] = IGNORED  # the first token has nothing before it
    return padded


@torch.no_grad()
def mean_loss(model: Any, batches: Iterable[Batch]) -> float:
    """Over all tokens that count."""
    total, count, device = 0.0, 0, device_of(model)
    with evaluating(model):
        for batch in batches:
            n = int((batch["labels"][:, 1:] != IGNORED).sum())
            total += n * model(**{name: x.to(device) for name, x in batch.items()}).loss.item()
            count += n
    return total / count


# --- the report ---


def tables(rows: Iterable[Row]) -> list[Block]:
    """A table for every task and number of steps, none without rows. Of equal cells the last one counts."""
    latest = {(r["task"], r["steps"], r["method"], r["learning_rate"], r["seed"]): r for r in rows}
    if not latest:
        return []
    blocks: list[Block] = [Heading("Positions"), Text(ABOUT)]
    for task, steps in dict.fromkeys(key[:2] for key in latest):
        own = [row for key, row in latest.items() if key[:2] == (task, steps)]
        whole = [row["base"] for row in own if "error" not in row]
        body = [["base model", "", "", "", *figures(whole)]] if whole else []
        for method, (adapter, seen) in VARIANTS.items():
            for rate in sorted({row["learning_rate"] for row in own if row["method"] == method}):
                runs = [row for row in own if (row["method"], row["learning_rate"]) == (method, rate)]
                failed = any("error" in row for row in runs)
                body.append([adapter, seen, f"{rate:g}", str(len(runs)), *(["fails"] if failed else figures(runs))])
        head = ["adapter", "phi sees", "rate", "seeds", "from 0", *(f"+{shift:,}" for shift in SHIFTS[1:])]
        head.append(f"behind {PADDING}")
        blocks += [Heading(f"Positions on {task}, {steps} steps", 3)]
        blocks.append(Table(head, [line + [""] * (len(head) - len(line)) for line in body]))
    return blocks


def figures(rows: Sequence[Row]) -> list[str]:
    found = [fmean(row["shifted"][str(shift)] for row in rows) for shift in SHIFTS]
    return [f"{x:.4f}" for x in (*found, fmean(row["left_padded"] for row in rows))]
