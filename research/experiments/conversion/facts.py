"""A document's facts, asked one by one after its KV cache made room for something of a given size."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ntk_attention.cli.evaluation import fidelity
from ntk_attention.cli.models import convert_gguf
from research.experiments import assets

from .documents import decode_ms, load
from .fact_methods import FACT_METHODS, WITHOUT_BUDGET, BudgetJob
from .fact_texts import FactText, Question
from .methods import Kept, Setting, synchronize
from .rows import Rows

DATA, MODEL = "facts", "qwen2.5-coder-0.5b"  # assets
START = 64  # tokens of the continuation that are looked at apart
MIB = 2**20


@dataclass(frozen=True)
class Cell:
    """One row: a method in so many bytes, 0 where it has no choice, on a document with a seed."""

    document: str
    method: str
    mib: float
    seed: int


def cells(
    documents: Sequence[str], methods: Sequence[str], budgets: Sequence[float], seeds: Sequence[int]
) -> list[Cell]:
    """In the order in which they run: what all of a document and seed needs is made once."""
    return [
        Cell(document, method, mib, seed)
        for seed in seeds
        for document in documents
        for method in methods
        for mib in ((0,) if method in WITHOUT_BUDGET else budgets)
    ]


def known_documents() -> dict[str, FactText]:
    """Raises ValueError if they have not been prepared."""
    return {row["name"]: FactText.of(row) for row in assets.read_rows(DATA, "documents")}


def model_source(name: str) -> str:
    """What a model is loaded from: the name of an asset, whose GGUF file becomes a folder first, or anything else."""
    if name not in assets.ASSETS:
        return name
    folder = assets.model_folder(name)
    quantised = next(folder.glob("*.gguf"), None)
    return str(folder if quantised is None else convert_gguf(quantised, folder / "dequantised"))


def run(out: Path, work: Path, wanted: Sequence[Cell], setting: Setting, minutes: float = math.inf) -> int:
    """Measure the cells without a row, none begun after so many minutes. Returns how many are left."""
    written, started = Rows(out / "facts.jsonl"), time.monotonic()
    documents, named = known_documents(), {}
    for cell in wanted:
        own = replace(setting, seed=cell.seed)
        named[cell] = {**asdict(cell), **asdict(own), "sha256": digest(documents[cell.document])}
    missing = [cell for cell in wanted if not written.has(named[cell])]
    loaded: Any = None
    job, made_for, expected = None, None, None
    for done, cell in enumerate(missing):
        if time.monotonic() - started > 60 * minutes:
            return len(missing) - done
        text, own = documents[cell.document], replace(setting, seed=cell.seed)
        loaded = loaded or load(model_source(setting.model))
        if made_for != (cell.document, cell.seed):
            job = None  # the one before lets go of its memory
            job, continuation = prepared(loaded, text, own, work)
            full = FACT_METHODS["full cache"](job)
            expected = measure(full, text, continuation, job.tokenizer, None)["logits"]
            full.model.unload()
            made_for = cell.document, cell.seed
        assert job is not None
        assert expected is not None
        job.held = int(cell.mib * MIB)
        seen = {"tokens": len(job.document), "study_seconds": job.studied["seconds"]}
        written.add(named[cell] | seen | result(cell, job, text, continuation, expected))
    return 0


def digest(text: FactText) -> str:
    """Of the document and its questions."""
    return hashlib.sha256(repr(text).encode()).hexdigest()[:16]


def prepared(loaded: Any, text: FactText, setting: Setting, work: Path) -> tuple[BudgetJob, Tensor]:
    """The document with what all methods learn from, made before any has the model; and what follows it.

    Raises:
        ValueError: if the text is no longer than what is held out of it.
    """
    base, tokenizer = loaded
    ids = torch.tensor(tokenizer(text.text, add_special_tokens=False)["input_ids"])[: setting.limit + setting.held_out]
    if len(ids) <= setting.held_out:
        raise ValueError(f"{text.name} has {len(ids)} tokens, {setting.held_out} are held out")
    job = BudgetJob(base, tokenizer, ids[: -setting.held_out], setting, work)
    _ = job.targets
    return job, ids[-setting.held_out :]


def result(cell: Cell, job: BudgetJob, text: FactText, continuation: Tensor, expected: Tensor) -> dict[str, Any]:
    """The figures, or the error that the method ends with. The model is as it was afterwards."""
    started = time.perf_counter()
    try:
        kept = FACT_METHODS[cell.method](job)
    except ValueError as error:  # no room, a divergence that is NaN
        job.strip()
        return {"error": str(error)}
    synchronize()
    seconds = time.perf_counter() - started
    try:
        figures = measure(kept, text, continuation, job.tokenizer, expected)
        figures |= {"bytes": kept.bytes, "made_in_seconds": round(seconds, 2)}
    finally:
        kept.model.unload()
    figures.pop("logits")
    return figures | {
        "prefill_seconds": round(job.prefill_seconds, 3),
        "kl_last": kept.curve[-1] if kept.curve else None,
    }


@torch.no_grad()
def measure(
    kept: Kept, text: FactText, continuation: Tensor, tokenizer: Any, expected: Tensor | None
) -> dict[str, Any]:
    """Fidelity by distance on what follows, the answers one by one, and the time of a token."""
    batch = {"input_ids": continuation[None].to(next(kept.model.parameters()).device)}
    with kept.active() as model:
        logits = model(**batch).logits
        figures: dict[str, Any] = {"logits": logits}
        if expected is None:
            return figures
        figures |= fidelity([batch], [expected], [logits])
        start = {"input_ids": batch["input_ids"][:, :START]}
        figures["kl_first"] = fidelity([start], [expected[:, :START]], [logits[:, :START]])["kl"]
        figures["decode_ms"] = decode_ms(model, batch["input_ids"][:, :8])
    asked = text.questions
    right, likelihood = [0] * len(asked), [0.0] * len(asked)
    for own, group in kept.groups(asked):
        with group.active() as model:
            answers = list(score(model, tokenizer, [asked[i] for i in own]))
        for i, (is_right, log) in zip(own, answers, strict=True):
            right[i], likelihood[i] = int(is_right), round(log, 3)
    finite = {name: x if math.isfinite(x) else None for name, x in figures.items() if name != "logits"}  # JSON
    return {"logits": logits} | finite | {"right": right, "likelihood": likelihood}


def score(model: Any, tokenizer: Any, asked: Sequence[Question], batch_size: int = 16) -> Iterator[tuple[bool, float]]:
    """For every question whether the answer is what is written greedily, to its last letter and no further, and its
    log-likelihood in nats."""
    device = next(model.parameters()).device

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    for begin in range(0, len(asked), batch_size):
        rows = [(encode(q.prompt), encode(q.answer)) for q in asked[begin : begin + batch_size]]
        width = max(len(prompt) + len(answer) for prompt, answer in rows)
        ids = torch.full((len(rows), width), tokenizer.pad_token_id)
        for i, (prompt, answer) in enumerate(rows):
            ids[i, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        logits = model(input_ids=ids.to(device)).logits
        for i, (prompt, answer) in enumerate(rows):
            own = logits[i, len(prompt) - 1 : len(prompt) + len(answer)].float()
            wanted = torch.tensor(answer, device=device)
            log = torch.log_softmax(own[:-1], dim=-1).gather(1, wanted[:, None]).sum().item()
            written = own.argmax(dim=-1)
            after = tokenizer.decode(written[-1:])
            yield bool((written[:-1] == wanted).all()) and not ends_inside(after), log


def ends_inside(after: str) -> bool:
    """Whether a word or a number goes on with this."""
    return after[:1].isalnum() or after[:1] == "_"
