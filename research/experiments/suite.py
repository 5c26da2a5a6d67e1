"""The development suite: tasks of many kinds, on whose validation data defaults are chosen; test data stay unseen.

Problems with short answers, written at temperature 0, texts in other languages and formats, and pictures. All training
batches of a task have one shape, so that a GPU records its step once, and no problem or text comes twice.
"""

from __future__ import annotations

from .classification import BackbonePictureTask
from .language import TEXT_LENGTH, LanguageTask

GROUP = "development suite"
STEPS, PROBLEMS, TEXTS_AT_ONCE = 300, 16, 8  # of training, and of a batch
# Problems by the kind, and how many tokens an item has at most, its prompt in the chat template of the model, if any.
LENGTHS = {
    "time-intervals": 88,
    "calendar": 88,
    "knights-knaves": 184,
    "equations": 72,
    "family": 104,
    "grid-path": 248,
    "letters": 80,
    "bases": 104,
    "polygon": 112,
    "rotation": 112,
}
TEXTS = ("go", "man-german", "handbook-spanish")
# Of other models: some of the same tasks, by the beginning of their names.
OTHERS: dict[str, tuple[str, dict[str, int]]] = {
    "gemma": ("gemma3-270m", {"calendar": 64, "rotation": 80}),
    "qwen": ("qwen2.5-coder-0.5b", {"calendar": 88, "rotation": 104}),
}
OTHER_TEXT = "man-german"


def problems(data: str, length: int, model: str, name: str | None = None) -> LanguageTask:
    return LanguageTask(
        name or data, GROUP, model, data, STEPS, PROBLEMS, max_new_tokens=24, max_length=length, pad_to=length,
        train_items=STEPS * PROBLEMS,
    )  # fmt: skip


def texts(data: str, model: str, name: str | None = None) -> LanguageTask:
    return LanguageTask(
        name or data, GROUP, model, data, STEPS, TEXTS_AT_ONCE, pad_to=TEXT_LENGTH, train_items=STEPS * TEXTS_AT_ONCE
    )


def of_another_model(prefix: str) -> list[LanguageTask]:
    model, lengths = OTHERS[prefix]
    found = [problems(data, length, model, f"{prefix}-{data}") for data, length in lengths.items()]
    return [*found, texts(OTHER_TEXT, model, f"{prefix}-{OTHER_TEXT}")]


SUITE = (
    *(problems(data, length, "smollm2-135m") for data, length in LENGTHS.items()),
    *(texts(data, "smollm2-135m") for data in TEXTS),
    *(task for prefix in OTHERS for task in of_another_model(prefix)),
    BackbonePictureTask("dino-64", GROUP, "dinov2-small", "fashion-target", STEPS, 32, shots=64),
    BackbonePictureTask("dino", GROUP, "dinov2-small", "fashion-target", 2 * STEPS, 32),
)
