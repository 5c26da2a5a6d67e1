"""The embedded tasks: word problems and sums that a package makes, as many as one asks for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from .data import Item


def chain_sum(size: int, seed: int) -> list[Item]:
    """Short sums and differences, such as 12 + 7 - 5."""
    return [
        Item(entry["question"], entry["answer"])
        for entry in reasoning_gym("chain_sum", size, seed, max_terms=3, max_digits=2)
    ]


def gsm_symbolic(size: int, seed: int) -> list[Item]:
    """Word problems in the style of GSM8K, answered with the number alone."""
    return [Item(entry["question"], entry["answer"]) for entry in reasoning_gym("gsm_symbolic", size, seed)]


def gsm_symbolic_worked(size: int, seed: int) -> list[Item]:
    """The same problems, answered with a worked solution that ends in '#### number'."""
    return [
        Item(
            entry["question"],
            f"{entry['metadata']['answer_cot'].split('####')[0].strip()}\n#### {entry['answer']}",
        )
        for entry in reasoning_gym("gsm_symbolic", size, seed)
    ]


def reasoning_gym(name: str, size: int, seed: int, **options: Any) -> Iterator[dict[str, Any]]:
    try:
        from reasoning_gym import create_dataset
    except ImportError as error:
        raise ValueError("the embedded problems are not installed: pip install reasoning-gym==0.1.25") from error
    yield from create_dataset(name, size=size, seed=seed, **options)


EMBEDDED_TASKS: dict[str, Callable[[int, int], list[Item]]] = {
    "gsm-symbolic": gsm_symbolic,
    "gsm-symbolic-worked": gsm_symbolic_worked,
    "chain-sum": chain_sum,
}


def metric_of(source: str) -> str:
    """What counts for a source, by its name in METRICS: the embedded tasks ask for a number, a file for its text."""
    return "final_number" if source in EMBEDDED_TASKS else "exact_match"
