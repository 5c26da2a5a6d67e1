"""The development suite: tasks of many kinds, on whose validation data defaults are chosen; test data stay unseen.

Problems with short answers, written at temperature 0, and texts in other languages and formats. All training batches of
a task have one shape, so that a GPU records its step once.
"""

from __future__ import annotations

from .language import TEXT_LENGTH, LanguageTask

GROUP = "development suite"
STEPS = 300
# Problems by the kind, and how many tokens an item has at most, its prompt in SmolLM2's chat template.
LENGTHS = {
    "time-intervals": 96,
    "calendar": 96,
    "knights-knaves": 192,
    "equations": 80,
    "family": 112,
    "grid-path": 256,
    "letters": 80,
    "bases": 112,
    "polygon": 112,
    "rotation": 112,
}
TEXTS = ("go", "man-german", "handbook-spanish")


def problems(name: str, length: int, model: str) -> LanguageTask:
    batch_size = 32 if length < 200 else 16
    return LanguageTask(
        name, GROUP, model, name, STEPS, batch_size, max_new_tokens=24, max_length=length, pad_to=length
    )


SUITE = (
    *(problems(name, length, "smollm2-135m") for name, length in LENGTHS.items()),
    *(LanguageTask(name, GROUP, "smollm2-135m", name, STEPS, 16, pad_to=TEXT_LENGTH) for name in TEXTS),
)
