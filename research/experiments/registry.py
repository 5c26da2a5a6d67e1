"""The tasks by name. The paper's own, which need the hub, stand in recipes.py, others in suite.py and public.py."""

from __future__ import annotations

from .classification import PictureTask, TextTask
from .language import LanguageTask
from .public import BENCHMARKS
from .recipes import RECIPES
from .suite import SUITE
from .tasks import Task


def registry() -> dict[str, Task]:
    words, text, few, full = "word problems", "held-out text", "text classification, few-shot", "text classification"
    vision, second = "vision", "second language model"
    smollm, gemma, minilm, vit = "smollm2-135m", "gemma3-270m", "minilm", "vit-fashion"
    tasks: list[Task] = [
        LanguageTask("chain-sum", words, smollm, "chain-sum", 400, 32, max_new_tokens=8),
        LanguageTask("gsm-worked", words, smollm, "gsm-worked", 300, 16, max_new_tokens=192),
        LanguageTask("perl", text, smollm, "perl", 300, 16),
        TextTask("sections-16", few, minilm, "sections", 300, 32, shots=16),
        TextTask("sections-64", few, minilm, "sections", 300, 32, shots=64),
        TextTask("bbc-16", few, minilm, "bbc", 200, 16, shots=16),
        TextTask("sections", full, minilm, "sections", 600, 32),
        TextTask("bbc", full, minilm, "bbc", 300, 16),
        PictureTask("fashion-64", vision, vit, "fashion-target", 300, 64, shots=64),
        PictureTask("fashion", vision, vit, "fashion-target", 600, 128),
        LanguageTask("gemma-chain-sum", second, gemma, "chain-sum", 300, 32, max_new_tokens=8),
        LanguageTask("gemma-gsm-worked", second, gemma, "gsm-worked", 300, 16, max_new_tokens=192),
    ]
    return {task.name: task for task in (*tasks, *SUITE, *BENCHMARKS, *RECIPES)}
