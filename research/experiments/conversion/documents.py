"""A document, and every way to go on without its KV cache: what is lost, and what is kept."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ntk_attention.cli.evaluation import fidelity
from ntk_attention.cli.models import load_model

from .methods import METHODS, Job, Kept, Setting, synchronize
from .rows import Rows
from .texts import Document, load_document, questions, score, text_of

DECODED = 16


def run(out: Path, work: Path, texts: Sequence[str], methods: Sequence[str], setting: Setting) -> None:
    """One row per text and method; those that stand in the folder are skipped, calibration texts are kept in `work`."""
    written = Rows(out / "documents.jsonl")
    loaded: Any = None
    for text in texts:
        named = {"text": Path(text).stem, **asdict(setting)}
        missing = [name for name in methods if not written.has({"method": name, **named})]
        if not missing:
            continue
        loaded = loaded or load(setting.model)
        document = load_document(text, loaded[1], setting.held_out, setting.limit, setting.seed)
        job = Job(*loaded, document.tokens, setting, work)
        named["tokens"] = len(document.tokens)
        named["sha256"] = hashlib.sha256(text_of(text).encode()).hexdigest()[:16]
        _ = job.targets, job.budget  # made before any method has the model
        full = METHODS["full cache"](job)
        expected = measure(full, document, job.tokenizer, None)["logits"]
        full.model.unload()
        named |= {"study_seconds": job.studied["seconds"], "budget_tokens": job.budget}
        for name in missing:
            written.add({"method": name, **named, **result(name, job, document, expected)})


def load(name: str) -> tuple[Any, Any]:
    """A frozen model and its tokenizer."""
    base, tokenizer = load_model(name)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return base.to(device).eval().requires_grad_(False), tokenizer


def result(name: str, job: Job, document: Document, expected: torch.Tensor) -> dict[str, Any]:
    """Of one method: its figures, or the error that it ends with. The model is as it was afterwards."""
    started = time.time()
    try:
        kept = METHODS[name](job)
    except ValueError as error:  # sums that are no state, a divergence that is NaN
        job.strip()
        return {"error": str(error)}
    synchronize()
    seconds = time.time() - started
    try:
        figures = measure(kept, document, job.tokenizer, expected)
        figures.pop("logits")
        figures |= {"numbers": kept.numbers, "bytes": kept.bytes, "made_in_seconds": round(seconds, 2)}
        figures["prefill_seconds"] = round(job.prefill_seconds, 3)
        if kept.curve:
            figures["kl_curve"] = [round(x, 4) for x in kept.curve[:: max(1, len(kept.curve) // 20)]]
    finally:
        kept.model.unload()
    return figures


@torch.no_grad()
def measure(kept: Kept, document: Document, tokenizer: Any, expected: torch.Tensor | None) -> dict[str, Any]:
    """Fidelity on the held-out continuation, whole and its first 64 tokens, the questions, and the time of a token."""
    batch = {"input_ids": document.continuation[None].to(next(kept.model.parameters()).device)}
    with kept.active() as model:
        logits = model(**batch).logits
        expected = logits if expected is None else expected
        figures: dict[str, Any] = fidelity([batch], [expected], [logits])
        start = {"input_ids": batch["input_ids"][:, :64]}
        figures["kl_first_64"] = fidelity([start], [expected[:, :64]], [logits[:, :64]])["kl"]
        for kind, asked in questions(document).items():
            figures |= {f"{kind}_{name}": value for name, value in score(model, tokenizer, asked).items()}
        figures["decode_ms"] = decode_ms(model, batch["input_ids"][:, :8])
    if not math.isfinite(figures["kl"]):
        figures["kl"] = None  # JSON has no infinity
    return figures | {"logits": logits}


def decode_ms(model: Any, prompt: torch.Tensor) -> float:
    """Milliseconds of one more token, batch 1."""
    times = []
    for n in (1, 1 + DECODED):
        synchronize()
        start = time.perf_counter()
        model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), do_sample=False,
                       min_new_tokens=n, max_new_tokens=n, pad_token_id=0)  # fmt: skip
        synchronize()
        times.append(time.perf_counter() - start)
    return round(1e3 * (times[1] - times[0]) / DECODED, 2)
