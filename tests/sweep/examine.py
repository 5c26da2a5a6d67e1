"""All checks of one model type, and the one word that they come to."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

from . import checks
from .build import Built, builds, summary
from .gradients import checkpointed, training_step
from .inputs import NoInputsError, find_inputs, shapes
from .outputs import are_equal, are_finite
from .subject import (
    NOT_APPLICABLE,
    PASSED,
    REFUSED,
    UNCLEAR,
    WRONG,
    NotApplicableError,
    Outcome,
    Subject,
    adapted_classes,
    is_refusal,
    left_out,
    messages,
    where,
)

WORKS, IN_PART, NOT_BUILT, SILENT = "works", "works in part", "not built", "silently wrong"
RESULTS = (WORKS, IN_PART, REFUSED, NOT_BUILT, SILENT, UNCLEAR)
Row = dict[str, Any]


def examine(model_type: str, progress: Callable[[str], None] = lambda stage: None) -> Row:
    """The row of one model type.

    Args:
        progress: called with the name of each stage before it starts.
    """
    started = time.time()
    row: Row = {"type": model_type}
    progress("build")
    problems: list[str] = []
    subject = find_subject(model_type, row, problems)
    if subject is None:
        reason = problems[0] if problems else "no class of transformers is made for this config alone"
        row |= {"result": NOT_BUILT, "reason": reason, "problems": problems[:8]}
    else:
        judge(subject, row, progress)
    return {**row, "seconds": round(time.time() - started, 1)}


def find_subject(model_type: str, row: Row, problems: list[str]) -> Subject | None:
    """The first class that is built, takes inputs, and gives the same finite outputs twice."""
    for built in builds(model_type, problems):
        name = type(built.model).__name__
        try:
            inputs = find_inputs(built.model)
        except NoInputsError as error:
            problems.append(f"{name}, {built.size}: no inputs found: {error}")
            continue
        subject = Subject(built.model, inputs)
        if not are_finite(subject.outputs):
            problems.append(f"{name}, {built.size}: outputs are not finite")
        elif not are_equal(subject.outputs, subject.run(subject.fresh())):
            problems.append(f"{name}, {built.size}: a copy gives other outputs")
        else:
            row |= describe(built, subject)
            return subject
    return None


def describe(built: Built, subject: Subject) -> Row:
    return {
        "class": type(built.model).__name__,
        "size": built.size,
        "parameters": sum(p.numel() for p in built.model.parameters()),
        "inputs": shapes(subject.inputs.values),
        "missing": subject.inputs.missing,
    }


def judge(subject: Subject, row: Row, progress: Callable[[str], None]) -> None:
    """Attach, and check everything where that works."""
    progress("attach")
    try:
        with messages() as said:
            model = subject.adapted()
    except Exception as error:
        if is_refusal(error):
            row |= {"result": REFUSED, "reason": str(error)}
        else:
            row |= {"result": UNCLEAR, "reason": f"attach: {summary(error)}", "where": where(error)}
        return
    row |= {
        "adapted": adapted_classes(model),
        "left_out": left_out(model),
        "said": next((text for text in said if text.startswith("NTK-Attention:")), ""),
    }
    outcomes = {"names what it leaves out": naming(row["left_out"], said)}
    for name, check in all_checks(subject, row):
        progress(name)
        outcomes[name] = settled(check, subject, name)
    row["checks"] = {name: {"status": o.status, "detail": o.detail} for name, o in outcomes.items()}
    progress("position shift")
    row["position_shift"] = checks.position_shift(subject)
    row |= verdict(row, outcomes)


def naming(omitted: dict[str, dict[str, Any]], said: list[str]) -> Outcome:
    """Whether a warning named the class, or one that it lies inside of."""
    unnamed = [
        kind for kind, entry in omitted.items() if not any(k in text for k in (kind, *entry["inside"]) for text in said)
    ]
    return Outcome(WRONG if unnamed else PASSED, f"nothing was said of {', '.join(unnamed)}" if unnamed else "")


def all_checks(subject: Subject, row: Row) -> list[tuple[str, Callable[[Subject], Outcome]]]:
    def step(s: Subject) -> Outcome:
        outcome, row["unreached"] = training_step(s)
        return outcome

    return [
        ("disabled", checks.disabled),
        ("weightless", checks.weightless),
        ("causal", checks.causal),
        *checks.padding_checks(subject),
        *((f"cache {kind}", partial(checks.cache, kind=kind)) for kind in checks.CACHES),
        ("training step", step),
        *((f"checkpointing {kind}", partial(checkpointed, use_reentrant=r)) for kind, r in REENTRANT),
        ("save and load", checks.saved_and_loaded),
        ("calibrate", checks.calibrated),
        ("unload", checks.unloaded),
    ]


OTHER_TEXTS = 4
REENTRANT = (("without reentry", False), ("with reentry", True))
BIT_EQUAL = ("disabled", "save and load", "unload", "calibrate", "training step")  # no rounding to allow for


def settled(check: Callable[[Subject], Outcome], subject: Subject, name: str) -> Outcome:
    """The outcome; where numbers are apart, what double precision and other texts say.

    In double precision rounding is told from faults. Other texts tell faults from models that choose: what two ways of
    computing the same round differently may lie on the two sides of a choice of experts or keys, with some texts.
    """
    outcome = attempt(check, subject)
    if outcome.status != WRONG or name in BIT_EQUAL:
        return outcome
    again = attempt_in_double(check, subject)
    if again.status == PASSED:
        return Outcome(PASSED, f"{outcome.detail}, {again.detail}")
    if subject.inputs.text is not None and name != "weightless":
        others = [attempt(check, subject.with_other_words(seed)) for seed in range(OTHER_TEXTS)]
        if sum(other.status == WRONG for other in others) <= OTHER_TEXTS // 2:
            return Outcome(PASSED, f"{outcome.detail}, with other texts {', '.join(o.detail for o in others)}")
    return Outcome(outcome.status, f"{outcome.detail}{', ' * bool(again.detail)}{again.detail}")


def attempt_in_double(check: Callable[[Subject], Outcome], subject: Subject) -> Outcome:
    """In float64, where the base model computes in it."""
    try:
        double = subject.double()
        if not are_finite(double.outputs):
            return Outcome(NOT_APPLICABLE)
    except Exception:
        return Outcome(NOT_APPLICABLE)
    again = attempt(check, double)
    return Outcome(again.status, f"{again.detail} in float64")


def attempt(check: Callable[[Subject], Outcome], subject: Subject) -> Outcome:
    try:
        return check(subject)
    except NotApplicableError as error:
        return Outcome(NOT_APPLICABLE, str(error))
    except Exception as error:
        if is_refusal(error):
            return Outcome(REFUSED, str(error))
        return Outcome(UNCLEAR, f"{summary(error)} ({where(error)})")


def verdict(row: Row, outcomes: dict[str, Outcome]) -> Row:
    """One word, and the sentence that explains it."""
    for status, result in ((WRONG, SILENT), (UNCLEAR, UNCLEAR)):
        found = {name: o.detail for name, o in outcomes.items() if o.status == status}
        if found:
            return {"result": result, "reason": "; ".join(f"{name}: {detail}" for name, detail in found.items())}
    refused = {name: o.detail for name, o in outcomes.items() if o.status == REFUSED}
    if {"causal", "training step", "save and load"} & set(refused) and "training step" in refused:
        return {"result": REFUSED, "reason": f"at the first forward pass: {refused['training step']}"}
    parts = row["said"].split("; ")[1:]  # of which the first says what has a prefix
    if row.get("unreached"):
        parts.append(f"never reached by the inputs: {len(row['unreached'])} modules, as {row['unreached'][0]}")
        parts += [f"no {name} given ({reason})" for name, reason in row["missing"].items()]
    parts += [f"{name} refused: {detail}" for name, detail in refused.items()]
    return {"result": IN_PART if parts else WORKS, "reason": "; ".join(parts)}
