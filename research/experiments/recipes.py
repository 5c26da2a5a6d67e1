"""The paper's own tasks: they run unchanged where the hub, or a local copy of model and data, can be reached.

Data come through `datasets.load_dataset`: of the hub, or of NTK_DATA/NAME, a folder with SPLIT.jsonl or SPLIT.parquet
files of the same columns (pictures: parquet, or SPLIT/CLASS/*.png). Models come from the hub, or from NTK_MODELS/NAME.
Where a data set has no validation split of its own, the last tenth of the training data is it; where its test labels
are secret (SuperGLUE), its validation split is the test, and the last tenth of the training data the validation.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Resampling
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from ntk_attention.cli.data import Item, same_final_number

from . import assets, budgets
from .classification import ClassificationTask, Classifier
from .judges import boxed, same_answer, same_text
from .language import LanguageTask
from .methods import METHODS
from .opponents import lora
from .public_data import worked
from .tasks import Base, Batch, Task

Example = dict[str, Any]
VIT = "google/vit-base-patch16-224-in21k"
LLAMA_1B, LLAMA_3B = "meta-llama/Llama-3.2-1B-Instruct", "meta-llama/Llama-3.2-3B-Instruct"
GLM = "zai-org/glm-4-9b-chat-hf"

# For a dry run, which reads nothing: the sizes of the architectures, as in their configs
ARCHITECTURES: dict[str, dict[str, Any]] = {
    VIT: {"model_type": "vit"},
    LLAMA_1B: {
        "model_type": "llama", "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 64, "intermediate_size": 8192, "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    LLAMA_3B: {
        "model_type": "llama", "hidden_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 24,
        "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 8192, "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    GLM: {
        "model_type": "glm", "hidden_size": 4096, "num_hidden_layers": 40, "num_attention_heads": 32,
        "num_key_value_heads": 2, "head_dim": 128, "intermediate_size": 13696, "vocab_size": 151552,
    },
}  # fmt: skip


# --- loaders ---


def local(variable: str, name: str) -> Path | None:
    """A copy that the user keeps: the last part of the hub's name in the folder of the variable."""
    root = os.environ.get(variable)
    path = Path(root) / name.split("/")[-1] if root else None
    return path if path is not None and path.exists() else None


def model_source(name: str) -> str:
    return str(local("NTK_MODELS", name) or name)


@cache
def load_split(data: str, config: str | None, split: str) -> Any:
    """One split, of a local copy or of the hub.

    Raises:
        ValueError: if neither can be read; the message says where a copy is looked for.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ValueError("the paper's tasks read their data with `datasets`: pip install datasets") from error
    folder = local("NTK_DATA", folder_name(data, config))
    try:
        if folder is None:
            return load_dataset(data, config, split=split)
        for suffix, kind in ((".jsonl", "json"), (".parquet", "parquet")):
            if (file := folder / f"{split}{suffix}").exists():
                return load_dataset(kind, data_files=str(file), split="train")
        return load_dataset("imagefolder", data_dir=str(folder), split=split)
    except Exception as error:
        raise ValueError(
            f"cannot read {data}{f' {config}' if config else ''}, split {split}, from {folder or 'the hub'} "
            f"({str(error).splitlines()[0][:120]}): put a copy into NTK_DATA/{folder_name(data, config)}/"
        ) from error


def folder_name(data: str, config: str | None) -> str:
    """Of a local copy."""
    return f"{data.split('/')[-1]}{f'-{config}' if config else ''}"


@dataclass(frozen=True)
class Splits:
    """Which splits of a data set are used for what; no validation: a tenth of the training data.

    All are shuffled, the same way everywhere: many come sorted by class.
    """

    train: str = "train"
    validation: str | None = "validation"
    test: str = "test"

    def rows(self, data: str, config: str | None, split: str) -> Any:
        name = {"train": self.train, "validation": self.validation or self.train, "test": self.test}[split]
        rows = load_split(data, config, name).shuffle(seed=0)
        if split == "test" or self.validation:
            return rows
        border = len(rows) - max(1, len(rows) // 10)
        return rows.select(range(border) if split == "train" else range(border, len(rows)))


class FromHub:
    """What both kinds of recipes do differently: any model of the hub, any data set."""

    selection_seeds, final_seeds = Task.selection_seeds, Task.final_seeds  # runs are long, validation sets large

    def check(self) -> None:
        task: Any = self
        if not task.has_head:
            assets.split_file("python-docs", "validation")  # for the forgetting
        for split in ("train", "validation", "test"):  # now, not after hours of training
            task.splits.rows(task.data, task.config, split)
        if local("NTK_MODELS", task.model) is None:
            try:
                AutoConfig.from_pretrained(task.model)
            except OSError as error:
                raise ValueError(
                    f"cannot reach the model {task.model}: put a copy into NTK_MODELS/{task.model.split('/')[-1]}/"
                ) from error


# --- language ---


@dataclass(frozen=True)
class LanguageRecipe(FromHub, LanguageTask):
    """Examples of a data set as prompts and completions; 300 for validation and 1,000 for the test at most."""

    config: str | None = None
    splits: Splits = Splits()
    render: Callable[[Example], Item] = lambda example: Item(example["prompt"], example["completion"])
    sample: tuple[tuple[str, Any], ...] = ()  # one made-up example with the columns of the data set

    def source(self) -> str:
        return model_source(self.model)

    def items(self, split: str) -> list[dict[str, str]]:
        found = map(self.render, self.splits.rows(self.data, self.config, split))
        return [{"prompt": item.prompt, "completion": item.completion} for item in found]


def choice(question: Callable[[Example], str], names: Sequence[str]) -> Callable[[Example], Item]:
    """A question answered with one of a few words."""

    def render(example: Example) -> Item:
        return Item(f"{question(example)}\nAnswer with one of: {', '.join(names)}.", names[example["label"]])

    return render


NO_YES = ("no", "yes")
SUPERGLUE: dict[str, tuple[Callable[[Example], Item], dict[str, Any]]] = {
    "boolq": (
        choice(lambda e: f"{e['passage']}\nQuestion: {e['question']}?", NO_YES),
        {"passage": "Ice is frozen water.", "question": "is ice water", "label": 1},
    ),
    "cb": (
        choice(
            lambda e: f"{e['premise']}\nDoes this entail, contradict or neither: {e['hypothesis']}",
            ("entailment", "contradiction", "neutral"),
        ),
        {"premise": "It rained.", "hypothesis": "It was wet.", "label": 0},
    ),
    "copa": (
        choice(
            lambda e: f"{e['premise']}\nWhich is the {e['question']}?\n1: {e['choice1']}\n2: {e['choice2']}", ("1", "2")
        ),
        {"premise": "It rained.", "choice1": "It is wet.", "choice2": "It is dry.", "question": "effect", "label": 0},
    ),
    "multirc": (
        choice(
            lambda e: f"{e['paragraph']}\nQuestion: {e['question']}\nAn answer: {e['answer']}\nIs it right?", NO_YES
        ),
        {"paragraph": "Ann has a cat.", "question": "What has Ann?", "answer": "A dog", "label": 0},
    ),
    "rte": (
        choice(lambda e: f"{e['premise']}\nDoes it follow that: {e['hypothesis']}", ("yes", "no")),
        {"premise": "It rained all day.", "hypothesis": "It rained.", "label": 0},
    ),
    "wic": (
        choice(
            lambda e: f"1: {e['sentence1']}\n2: {e['sentence2']}\nDoes {e['word']!r} mean the same in both?", NO_YES
        ),
        {"word": "bank", "sentence1": "A river bank.", "sentence2": "A savings bank.", "label": 0},
    ),
    "wsc": (
        choice(
            lambda e: f"{e['text']}\nDoes {e['span2_text']!r} refer to {e['span1_text']!r}?", NO_YES
        ),
        {"text": "Ann told Bea that she won.", "span1_text": "Ann", "span2_text": "she", "label": 1},
    ),
}  # fmt: skip


def gsm8k(example: Example) -> Item:
    """The worked solution without its calculator marks, which ends in '#### number'."""
    return Item(example["question"], worked(example["answer"]))


def math(example: Example) -> Item:
    """The worked solution, and what stands in its last box after '####'."""
    return Item(example["problem"], f"{example['solution']}\n#### {boxed(example['solution'])}")


# --- pictures ---


@dataclass(frozen=True)
class PictureRecipe(FromHub, ClassificationTask):
    """Pictures of a data set, resized and scaled to [-1, 1], as the processor of the ViT checkpoints does it."""

    sees_pictures = True

    config: str | None = None
    splits: Splits = Splits(validation=None)
    image: str = "image"
    label: str = "label"

    def source(self) -> str:
        return model_source(self.model)

    def load(self, device: str) -> Base:
        num_classes = self.splits.rows(self.data, self.config, "train").features[self.label].num_classes
        model = Classifier(self.load_encoder(add_pooling_layer=False), num_classes, "first")
        return Base(model.to(device).requires_grad_(False))

    def examples(self, base: Base, split: str, seed: int) -> Pictures:
        rows = self.splits.rows(self.data, self.config, split)
        return Pictures(rows, self.few(rows[self.label][:], seed) if split == "train" else list(range(len(rows))))

    def batch(self, base: Base, examples: Sequence[Example]) -> Batch:
        size = picture_size(base)
        pictures = [
            example[self.image].convert("RGB").resize((size, size), Resampling.BILINEAR) for example in examples
        ]
        pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2)
        labels = torch.tensor([example[self.label] for example in examples])
        return {"pixel_values": pixels.float() / 127.5 - 1, "labels": labels}

    def unrelated_batches(self, base: Base) -> list[Batch]:
        size = picture_size(base)
        generator = torch.Generator().manual_seed(0)
        shape = (self.batch_size, 3, size, size)
        return [{"pixel_values": torch.randn(shape, generator=generator)} for _ in range(self.calibration_batches)]

    def unrelated_loss(self, base: Base, model: nn.Module) -> None:
        """The checkpoints on the hub come without the head that they were pretrained with."""


def picture_size(base: Base) -> int:
    model: Any = base.model
    return model.config.image_size


class Pictures(Sequence):
    """Rows of a data set in some order; a picture is decoded when it is asked for."""

    def __init__(self, rows: Any, order: Sequence[int]):
        self.rows, self.order = rows, order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self.rows[i] for i in self.order[place]]
        return self.rows[self.order[place]]


# --- the recipes by name, with the paper's models ---


def superglue(name: str) -> LanguageRecipe:
    render, sample = SUPERGLUE[name]
    return LanguageRecipe(
        f"superglue-{name}", "SuperGLUE", LLAMA_1B, "aps/super_glue", 1000, 32, max_new_tokens=8, max_length=1024,
        judge=same_text, judged="accuracy", config=name, splits=Splits(validation=None, test="validation"),
        render=render, sample=tuple(sample.items()),
    )  # fmt: skip


def math_recipe(name: str, data: str, render: Callable[[Example], Item], judge: Any, **options: Any) -> LanguageRecipe:
    return LanguageRecipe(
        name, "mathematics", LLAMA_3B, data, 700, 32, max_new_tokens=400, max_length=1024, judge=judge, render=render,
        splits=Splits(validation=None), **options,
    )  # fmt: skip


def picture_recipe(name: str, data: str, steps: int, **options: Any) -> PictureRecipe:
    return PictureRecipe(f"vit-{name}", "pictures", VIT, data, steps, 256, **options)  # about 30 epochs, as the paper's


RECIPES: list[Task] = [
    picture_recipe("cifar100", "uoft-cs/cifar100", 5300, image="img", label="fine_label"),
    picture_recipe("food101", "ethz/food101", 8000, splits=Splits(validation=None, test="validation")),
    picture_recipe("tiny-imagenet", "zh-plus/tiny-imagenet", 10500, splits=Splits(validation=None, test="valid")),
    *map(superglue, SUPERGLUE),
    replace(superglue("boolq"), name="superglue-boolq-glm", model=GLM),
    math_recipe(
        "gsm8k", "openai/gsm8k", gsm8k, same_final_number, config="main",
        sample=(("question", "What is 2 + 3?"), ("answer", "It is <<2+3=5>>5.\n#### 5")),
    ),
    math_recipe(
        "math", "DigitalLearningGmbH/MATH-lighteval", math, same_answer, judged="final answer",
        sample=(("problem", "Solve $2x = 1$."), ("solution", "So $x = \\boxed{\\frac{1}{2}}$.")),
    ),
]  # fmt: skip


# --- a dry run ---


def dry_run(task: Task, methods: Sequence[str]) -> Iterator[str]:
    """What would be run: ours, the LoRAs of `methods` and the prefix on the real architecture, one made-up example.

    Raises:
        ValueError: if a method cannot have the size it should.
    """
    model = skeleton(task)
    size = budgets.ours(model)
    yield f"{task.name}: {task.model} on {task.data}, {task.steps} steps of {task.batch_size}, metric {task.metric}"
    yield f"  NTK-Attention: {size:,} trainable of {sum(p.numel() for p in model.parameters()):,}"
    for name in methods:
        method = METHODS[name]
        if method.build.__class__ is partial and method.build.func is lora and method.only(task):  # type: ignore
            options = method.build.keywords  # type: ignore[attr-defined]
            wanted = options["budget"](model)
            ranks = budgets.lora_ranks(model, wanted, options.get("pattern"), options.get("dora", False))
            some = f", {ranks.base + 1} on {len(ranks.higher)} of them" if ranks.higher else ""
            yield f"  {method.label}: rank {ranks.base} on {len(ranks.by_module)} modules{some}"
    yield f"  prefix: m = {budgets.prefix_length(model, size)}"
    if isinstance(task, LanguageRecipe):
        item = task.render(dict(task.sample))
        if not item.prompt or not task.judge(item.completion, item.completion):
            raise ValueError(f"{task.name}: its made-up example gives {item}: a prompt and an answer are expected")
        yield f"  prompt: {item.prompt!r}"
        yield f"  completion: {item.completion!r}"
    config = getattr(task, "config", None)
    for what, variable, name in (
        ("model", "NTK_MODELS", task.model.split("/")[-1]),
        ("data", "NTK_DATA", folder_name(task.data, config)),
    ):
        yield f"  {what}: {local(variable, name) or f'from the hub, or a copy in {variable}/{name}'}"


def skeleton(task: Task) -> nn.Module:
    """The architecture without weights."""
    if task.model in ARCHITECTURES:
        config = AutoConfig.for_model(**ARCHITECTURES[task.model])
    else:
        config = AutoConfig.from_pretrained(task.source())  # type: ignore[attr-defined]
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        return AutoModel.from_config(config) if task.has_head else AutoModelForCausalLM.from_config(config)
