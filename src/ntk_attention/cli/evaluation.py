"""How good a model is at items: loss of the completions, and share of the generated answers that are right."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..tuner.distributed import device_of, inputs_on
from ..tuner.observation import evaluating
from .data import IGNORED, METRICS, Item, Message, Row, collate, prompt_tokens

MAX_NEW_TOKENS = 48
BATCH_SIZE = 32
Progress = Callable[[int], None]  # called with the number of items done since the last call


@torch.no_grad()
def mean_loss(
    model: PreTrainedModel,
    rows: Sequence[Row],
    pad_token_id: int,
    batch_size: int = BATCH_SIZE,
    progress: Progress = lambda n: None,
) -> float:
    """Cross-entropy in nats, averaged over all tokens that count."""
    total, count = 0.0, 0
    device = device_of(model)
    with evaluating(model):
        for i in range(0, len(rows), batch_size):
            batch = collate(rows[i : i + batch_size], pad_token_id)
            n = int((batch["labels"][:, 1:] != IGNORED).sum())
            if n:
                total += n * model(**{k: v.to(device) for k, v in batch.items()}).loss.item()
                count += n
            progress(len(batch["labels"]))
    if count == 0:
        raise ValueError("the items have no token that counts: a loss needs at least two tokens")
    return total / count


@torch.no_grad()
def logits_of(model: Any, batches: Sequence[Mapping[str, Tensor]]) -> list[Tensor]:
    """Logits [B, L, vocabulary] for every batch."""
    with evaluating(model):
        return [model(**batch).logits for batch in batches]


@torch.no_grad()
def fidelity(
    batches: Sequence[Mapping[str, Tensor]], expected: Sequence[Tensor], actual: Sequence[Tensor]
) -> dict[str, float]:
    """How near a model's logits are to those of another one.

    Returns:
        kl: KL(expected || actual) in nats per token; agreement: share of the tokens at which both would write the
        same; perplexity: of the batches' text by the model that `actual` is of.
    """
    kl, agreement, nll, count, predicted = 0.0, 0.0, 0.0, 0, 0
    for batch, e, a in zip(batches, expected, actual, strict=True):
        ids = batch["input_ids"]
        mask = batch["attention_mask"].bool() if "attention_mask" in batch else torch.ones_like(ids, dtype=torch.bool)
        e, a = (torch.log_softmax(x.float(), dim=-1) for x in (e, a))
        kl += (e.exp() * (e - a)).sum(dim=-1)[mask].double().sum().item()
        agreement += (e.argmax(dim=-1) == a.argmax(dim=-1))[mask].sum().item()
        both = mask[:, 1:] & mask[:, :-1]
        nll -= a[:, :-1].gather(2, ids[:, 1:, None])[..., 0][both].double().sum().item()
        count += int(mask.sum())
        predicted += int(both.sum())
    return {"kl": kl / count, "agreement": agreement / count, "perplexity": math.exp(nll / max(predicted, 1))}


def check_room(
    prompts: Sequence[str | Sequence[Message]], tokenizer: PreTrainedTokenizerBase, max_new_tokens: int, limit: int
) -> None:
    """Raise ValueError unless the model has positions for every prompt and its answer, `limit` in all."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be positive, got {max_new_tokens}")
    longest = max((len(prompt_tokens(prompt, tokenizer)) for prompt in prompts), default=0)
    if longest + max_new_tokens > limit:
        raise ValueError(
            f"a prompt of {longest} tokens and an answer of max_new_tokens = {max_new_tokens} are more than the model "
            f"takes, {limit}"
        )


def stop_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What ends an answer: the tokenizer's end token, and those of the model, such as the end of a turn."""
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    named = named if isinstance(named, list) else [named]
    return sorted({tokenizer.eos_token_id, *(token for token in named if token is not None)})


@torch.no_grad()
def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | Sequence[Message]],
    max_new_tokens: int = MAX_NEW_TOKENS,
    progress: Progress = lambda n: None,
    batch_size: int = BATCH_SIZE,
) -> list[str]:
    """What the model writes after each prompt, greedily."""
    texts, device = [], device_of(model)
    with evaluating(model), inputs_on(device, model):
        for i in range(0, len(prompts), batch_size):
            rows = [prompt_tokens(prompt, tokenizer) for prompt in prompts[i : i + batch_size]]
            length = max(map(len, rows))
            ids = [[tokenizer.pad_token_id] * (length - len(row)) + row for row in rows]
            mask = [[0] * (length - len(row)) + [1] * len(row) for row in rows]
            out = model.generate(
                input_ids=torch.tensor(ids, device=device),
                attention_mask=torch.tensor(mask, device=device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=stop_tokens(model, tokenizer),
                pad_token_id=tokenizer.pad_token_id,
            )
            texts += tokenizer.batch_decode(
                out[:, length:], skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
            progress(len(rows))
    return texts


def share_right(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Item],
    metric: str,
    max_new_tokens: int = MAX_NEW_TOKENS,
    progress: Progress = lambda n: None,
) -> float:
    """Share of the items whose generated answer is right by a metric of `data.METRICS`."""
    texts = answers(model, tokenizer, [item.prompt for item in items], max_new_tokens, progress)
    right = METRICS[metric]
    return sum(right(text, item.completion) for text, item in zip(texts, items, strict=True)) / len(items)


def figures(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    asked: Sequence[Item],
    metric: str,
    max_new_tokens: int = MAX_NEW_TOKENS,
    progress: Progress = lambda n: None,
) -> dict[str, float]:
    """Loss of the rows, and by the metric's name the share of the items asked that is right, if there are any."""
    found = {"loss": mean_loss(model, rows, tokenizer.pad_token_id, progress=progress)}
    if asked:
        found[metric] = share_right(model, tokenizer, asked, metric, max_new_tokens, progress)
    return found
