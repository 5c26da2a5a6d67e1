"""A small ViT that is really pretrained: on five classes of Fashion-MNIST, each turned four ways (20 classes).

The turns make a task of five easy classes from which general features are learned; the other five classes are never
seen. `python -m research pretrain` writes the model, its head and a record of the run to the assets.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import ViTConfig, ViTModel

from research.recording import commit, hardware, versions

from . import assets
from .classification import HEAD, TURNS, Classifier, normalised, rotated
from .steps import training_on

NAME = "vit-fashion"
CONFIG = {
    "hidden_size": 192,
    "num_hidden_layers": 6,
    "num_attention_heads": 3,
    "intermediate_size": 768,
    "image_size": 28,
    "patch_size": 4,
    "num_channels": 1,
}
STEPS, BATCH, LEARNING_RATE, WEIGHT_DECAY, SEED = 4000, 256, 1e-3, 0.05, 0


def augmented(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Half of them mirrored, the batch shifted by up to two pixels."""
    mirror = torch.rand(len(pictures), generator=generator, device=pictures.device) < 0.5
    pictures = torch.where(mirror[:, None, None, None], pictures.flip(-1), pictures)
    shift = torch.randint(-2, 3, (2,), generator=generator, device=pictures.device).tolist()
    return pictures.roll(shift, dims=(-2, -1))


def pretrain(device: str, steps: int = STEPS, progress: Callable[[int, float], None] = lambda step, loss: None) -> dict:
    """Train, save and describe the model."""
    torch.manual_seed(SEED)
    started = time.time()
    pictures, labels = (x.to(device) for x in assets.pictures("fashion-source", "train"))
    num_classes = TURNS * (1 + int(labels.max()))
    model = Classifier(ViTModel(ViTConfig(**CONFIG), add_pooling_layer=False), num_classes, "first").to(device)
    groups = [{"params": list(model.parameters()), "lr": LEARNING_RATE}]
    training = training_on(device)(
        model, groups, steps, lambda: torch.autocast(device, torch.bfloat16, enabled=device == "cuda"), WEIGHT_DECAY
    )
    generator = torch.Generator(device).manual_seed(SEED)
    curve: list[float] = []
    for step in range(steps):
        chosen = torch.randint(len(pictures), (BATCH,), generator=generator, device=device)
        turns = torch.randint(TURNS, (BATCH,), generator=generator, device=device)
        batch, targets = rotated(augmented(pictures[chosen], generator), labels[chosen], turns)
        loss = training.step({"pixel_values": normalised(batch), "labels": targets})
        if (step + 1) % max(1, steps // 40) == 0:
            curve.append(round(loss.item(), 4))
            progress(step + 1, curve[-1])
    record = {
        "model": NAME,
        "config": CONFIG,
        "steps": steps,
        "batch_size": BATCH,
        "learning_rate": LEARNING_RATE,
        "weight_decay": WEIGHT_DECAY,
        "seed": SEED,
        "train_pictures": len(pictures),
        "curve": curve,
        "test_accuracy": accuracy(model, device),
        "seconds": round(time.time() - started, 1),
        "hardware": hardware(device),
        "versions": versions(),
        "commit": commit("src", "research/experiments"),
    }
    save(model, record)
    return record


@torch.no_grad()
def accuracy(model: Classifier, device: str) -> float:
    """Of class and turn, on the test pictures of the five classes."""
    pictures, targets = rotated(*assets.pictures("fashion-source", "test"))
    model.eval()
    found = [model(pixel_values=normalised(part.to(device))).logits.argmax(-1).cpu() for part in pictures.split(500)]
    return (torch.cat(found) == targets).float().mean().item()


def save(model: Classifier, record: dict) -> None:
    target = assets.new_model(NAME)
    model.encoder.save_pretrained(target)  # type: ignore[operator]
    save_file({name: x.contiguous() for name, x in model.head.state_dict().items()}, target / HEAD)
    (target / "pretraining.json").write_text(json.dumps(record, indent=1) + "\n")
