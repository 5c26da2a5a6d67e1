"""Tasks of encoders with a new linear classifier on top: sentences with MiniLM, pictures with a ViT."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer

from ntk_attention.tuner.observation import evaluating

from . import assets
from .tasks import Base, Batch, Score, Task

TEXT_LENGTH = 128  # tokens
EVALUATION_BATCH = 256
UNRELATED_ITEMS = 512
TURNS, HEAD = 4, "head.safetensors"  # of what the ViT was pretrained for, see pretraining.py
PIXELS, PROBED = 112, 2000  # a side of a picture for the backbone, and pictures that its probe is fitted to
MEAN, DEVIATION = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
TEMPERATURE = 0.05  # of the contrastive loss that MiniLM was trained with (scale 20)


class Classifier(nn.Module):
    """An encoder, its pooled output and a linear head."""

    base_model_prefix = "encoder"  # transformers asks for it when peft attaches

    def __init__(self, encoder: nn.Module, num_classes: int, pooling: str):
        super().__init__()
        self.encoder, self.pooling = encoder, pooling
        self.config: Any = encoder.config
        self.head = nn.Linear(self.config.hidden_size, num_classes)

    def pooled(self, **inputs: Tensor) -> Tensor:
        """[B, hidden]: of the first token, or the mean over the real tokens."""
        hidden = self.encoder(**inputs).last_hidden_state
        if self.pooling == "first":
            return hidden[:, 0]
        mask = inputs["attention_mask"][..., None].to(hidden.dtype)
        return (hidden * mask).sum(dim=1) / mask.sum(dim=1)

    def forward(self, labels: Tensor | None = None, **inputs: Tensor) -> SimpleNamespace:
        logits = self.head(self.pooled(**inputs))
        loss = None if labels is None else F.cross_entropy(logits.float(), labels)
        return SimpleNamespace(loss=loss, logits=logits)


def classifier_of(model: nn.Module) -> Classifier:
    return next(module for module in model.modules() if isinstance(module, Classifier))


@dataclass(frozen=True)
class ClassificationTask(Task):
    shots: int | None = None  # training examples of each class; None: all there are

    has_head = True

    @property
    def selection_seeds(self) -> tuple[int, ...]:
        """More than one: runs are short, validation sets small, and a few examples drawn once say little."""
        return (0, *range(101, 108))

    @property
    def final_seeds(self) -> tuple[int, ...]:
        return tuple(range(1, 9))

    def load_encoder(self, **options: Any) -> Any:
        try:  # float32, small as they are
            return AutoModel.from_pretrained(self.source(), attn_implementation="sdpa", **options).float()
        except OSError as error:
            raise ValueError(f"cannot load the model {self.model!r}: {str(error).splitlines()[0]}") from error

    def source(self) -> str:
        return self.model if "/" in self.model else str(assets.model_folder(self.model))

    def fresh(self, base: Base, seed: int) -> nn.Module:
        model = copy.deepcopy(base.model)
        generator = torch.Generator().manual_seed(seed)
        for module in model.modules():
            if isinstance(module, Classifier):
                weight = module.head.weight
                with torch.no_grad():
                    weight.copy_(torch.randn(weight.shape, generator=generator) * 0.02)
                    module.head.bias.zero_()
        return model

    def few(self, labels: Sequence[int], seed: int) -> list[int]:
        """Places of the training examples: all in order, or `shots` of each class, drawn by the seed."""
        if self.shots is None:
            return list(range(len(labels)))
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).tolist()
        taken: dict[int, int] = {}
        chosen = []
        for i in order:
            if taken.get(labels[i], 0) < self.shots:
                taken[labels[i]] = taken.get(labels[i], 0) + 1
                chosen.append(i)
        return chosen

    @torch.no_grad()
    def score(self, base: Base, model: nn.Module, examples: Sequence[Any], with_answers: bool) -> Score:
        device = next(model.parameters()).device
        total, correct = 0.0, []
        with evaluating(model):
            for i in range(0, len(examples), EVALUATION_BATCH):
                batch = {k: v.to(device) for k, v in self.batch(base, examples[i : i + EVALUATION_BATCH]).items()}
                out = model(**batch)
                total += out.loss.item() * len(batch["labels"])
                correct += (out.logits.argmax(dim=-1) == batch["labels"]).tolist()
        return Score(total / len(correct), sum(correct) / len(correct), correct)


@dataclass(frozen=True)
class TextTask(ClassificationTask):
    """Rows {text, label}."""

    def check(self) -> None:
        self.source()
        assets.split_file(self.data, "train")
        assets.split_file("python-docs", "validation")

    def load(self, device: str) -> Base:
        num_classes = 1 + max(row["label"] for row in assets.read_rows(self.data, "train"))
        model = Classifier(self.load_encoder(add_pooling_layer=False), num_classes, "mean")
        return Base(model.to(device).requires_grad_(False), AutoTokenizer.from_pretrained(self.source()))

    def examples(self, base: Base, split: str, seed: int) -> list[dict[str, Any]]:
        rows = assets.read_rows(self.data, split)
        if split == "train":
            rows = [rows[i] for i in self.few([row["label"] for row in rows], seed)]
        tokens = base.tokenizer([row["text"] for row in rows], truncation=True, max_length=TEXT_LENGTH)["input_ids"]
        return [{"input_ids": ids, "label": row["label"]} for ids, row in zip(tokens, rows, strict=True)]

    def batch(self, base: Base, examples: Sequence[dict[str, Any]]) -> Batch:
        batch = base.tokenizer.pad(
            {"input_ids": [e["input_ids"] for e in examples]}, return_tensors="pt", pad_to_multiple_of=8
        )
        labels = {"labels": torch.tensor([e["label"] for e in examples])} if "label" in examples[0] else {}
        return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], **labels}

    def unrelated_batches(self, base: Base) -> list[Batch]:
        texts = [row["text"] for row in assets.read_rows("python-docs", "validation")]
        size, most = self.batch_size, self.batch_size * self.calibration_batches
        return [self.encode(base, texts[i : i + size]) for i in range(0, min(most, len(texts)), size)]

    def encode(self, base: Base, texts: Sequence[str]) -> Batch:
        tokens = base.tokenizer(list(texts), truncation=True, max_length=TEXT_LENGTH)["input_ids"]
        return self.batch(base, [{"input_ids": ids} for ids in tokens])

    @torch.no_grad()
    def unrelated_loss(self, base: Base, model: nn.Module) -> float:
        """MiniLM's own: find the second half of a passage by its first, among 64."""
        texts = [row["text"] for row in assets.read_rows("python-docs", "validation")][:UNRELATED_ITEMS]
        device, pool = next(model.parameters()).device, classifier_of(model).pooled
        losses = []
        with evaluating(model):
            for i in range(0, len(texts) - 63, 64):
                part = texts[i : i + 64]
                halves = ([t[: len(t) // 2] for t in part], [t[len(t) // 2 :] for t in part])
                batches = ({k: v.to(device) for k, v in self.encode(base, half).items()} for half in halves)
                first, second = (F.normalize(pool(**batch).float(), dim=-1) for batch in batches)
                target = torch.arange(len(part), device=device)
                losses.append(F.cross_entropy(first @ second.T / TEMPERATURE, target).item())
        return sum(losses) / len(losses)


@dataclass(frozen=True)
class PictureTask(ClassificationTask):
    """The ViT of pretraining.py on the classes of Fashion-MNIST that it has not seen."""

    sees_pictures = True

    def check(self) -> None:
        self.source()
        assets.split_file(self.data, "train", "npz")
        assets.split_file("fashion-source", "test", "npz")

    def load(self, device: str) -> Base:
        num_classes = 1 + int(assets.pictures(self.data, "train")[1].max())
        model = Classifier(self.load_encoder(add_pooling_layer=False), num_classes, "first")
        return Base(model.to(device).requires_grad_(False), source_head=load_head(self.source()).to(device))

    def pixels(self, pictures: Tensor) -> Tensor:
        """What the model takes, of uint8 [N, 1, 28, 28]."""
        return normalised(pictures)

    def examples(self, base: Base, split: str, seed: int) -> list[tuple[Tensor, int]]:
        pictures, labels = assets.pictures(self.data, split)
        places = self.few(labels.tolist(), seed) if split == "train" else range(len(labels))
        return [(pictures[i], int(labels[i])) for i in places]

    def batch(self, base: Base, examples: Sequence[tuple[Tensor, int]]) -> Batch:
        pictures = torch.stack([picture for picture, _ in examples])
        return {"pixel_values": self.pixels(pictures), "labels": torch.tensor([label for _, label in examples])}

    def unrelated_batches(self, base: Base) -> list[Batch]:
        pictures, _ = assets.pictures("fashion-source", "train")
        size = self.batch_size
        return [
            {"pixel_values": self.pixels(pictures[i * size : (i + 1) * size])} for i in range(self.calibration_batches)
        ]

    @torch.no_grad()
    def unrelated_loss(self, base: Base, model: nn.Module) -> float:
        """The task that the ViT was pretrained for, with the head it had then."""
        assert base.source_head is not None
        pictures, labels = assets.pictures("fashion-source", "test")
        hidden, targets = self.hidden(model, pictures[:UNRELATED_ITEMS], labels[:UNRELATED_ITEMS])
        return F.cross_entropy(base.source_head(hidden).float(), targets).item()

    @torch.no_grad()
    def hidden(self, model: nn.Module, pictures: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled outputs for pictures that are turned, and the classes that `rotated` gives them, on the device."""
        device, pool = next(model.parameters()).device, classifier_of(model).pooled
        pictures, targets = rotated(pictures, labels)
        with evaluating(model):
            found = [pool(pixel_values=self.pixels(p).to(device)) for p in pictures.split(EVALUATION_BATCH)]
        return torch.cat(found), targets.to(device)


@dataclass(frozen=True)
class BackbonePictureTask(PictureTask):
    """A backbone for photographs on the same classes; what it may forget is told by a linear probe of the others."""

    def load(self, device: str) -> Base:
        num_classes = 1 + int(assets.pictures(self.data, "train")[1].max())
        model = Classifier(self.load_encoder(), num_classes, "first").to(device).requires_grad_(False)
        pictures, labels = assets.pictures("fashion-source", "train")
        return Base(model, source_head=probe(*self.hidden(model, pictures[:PROBED], labels[:PROBED])))

    def pixels(self, pictures: Tensor) -> Tensor:
        """As large as PIXELS, in three equal channels, scaled as ImageNet's are."""
        large = F.interpolate(pictures.float() / 255, PIXELS, mode="bicubic", antialias=True).clamp(0, 1)
        return (large.expand(-1, 3, -1, -1) - MEAN[:, None, None]) / DEVIATION[:, None, None]


def normalised(pictures: Tensor) -> Tensor:
    """uint8 to float32 of about zero mean and unit variance."""
    return (pictures.float() / 255 - 0.29) / 0.35


def rotated(pictures: Tensor, labels: Tensor, turns: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Pictures turned by quarters, and their class among TURNS times as many; by default turned 0, 1, 2, 3, 0, ..."""
    turns = torch.arange(len(pictures)) % TURNS if turns is None else turns
    turns = turns.to(pictures.device)
    out = pictures.clone()
    for turn in range(1, TURNS):
        out[turns == turn] = torch.rot90(pictures[turns == turn], turn, (-2, -1))
    return out, labels * TURNS + turns


def load_head(folder: str) -> nn.Linear:
    weights = load_file(Path(folder) / HEAD)
    head = nn.Linear(weights["weight"].shape[1], weights["weight"].shape[0])
    head.load_state_dict(weights)
    return head.requires_grad_(False)


def probe(features: Tensor, labels: Tensor, decay: float = 0.01) -> nn.Linear:
    """Logistic regression on standardised features, with `decay` times the squares of its weights."""
    deviation, mean = torch.std_mean(features, dim=0)
    deviation = deviation + 1e-6
    head = nn.Linear(features.shape[1], 1 + int(labels.max()), device=features.device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=200, line_search_fn="strong_wolfe")
    scaled = (features - mean) / deviation

    def loss() -> Tensor:
        optimizer.zero_grad()
        found = F.cross_entropy(head(scaled), labels) + decay * head.weight.square().sum()
        found.backward()
        return found

    optimizer.step(loss)
    with torch.no_grad():
        head.weight /= deviation
        head.bias -= head.weight @ mean
    return head.requires_grad_(False)
