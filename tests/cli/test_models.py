"""Loading of base models: tokenizers that a conversion has spoiled, that lack tokens or cannot be read."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from ntk_attention.cli.models import check_tokenizer, load_model, load_tokenizer, longest_input
from tests.tiny import save_model

WORDS = ("prefix", "token", "head")


def tokenizer(with_merges: bool):
    """Of three words that are made of their first letters, one letter more at a time."""
    letters = sorted(set("".join(WORDS)))
    merges = [(word[:i], word[i]) for word in WORDS for i in range(1, len(word))]
    tokens = [*letters, *(left + right for left, right in merges)]
    model = BPE({token: i for i, token in enumerate(tokens)}, merges if with_merges else [])
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model))


def test_whole_words_stay_whole():
    check_tokenizer(tokenizer(with_merges=True), Path("model.gguf"))


def test_lost_merges_are_an_error():
    with pytest.raises(ValueError, match=r"tokenizer in model\.gguf: of 25 tokens that are words it keeps 13 whole"):
        check_tokenizer(tokenizer(with_merges=False), Path("model.gguf"))


def without(folder, token):
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config[token]
    path.write_text(json.dumps(config))


def test_a_tokenizer_without_a_token(tmp_path):
    """It pads with the end, whose places are masked; without an end no answer could be closed."""
    save_model(tmp_path)
    without(tmp_path, "pad_token")
    assert load_tokenizer(str(tmp_path)).pad_token == "<end>"
    without(tmp_path, "eos_token")
    with pytest.raises(ValueError, match="has no end token: expected one, to close the answers with"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("tokenizer.json", "{}", "the tokenizer of .*: KeyError"),
        ("tokenizer.json", '{"added_tokens"', "the tokenizer of .*: Expecting"),
        ("config.json", "{", "the tokenizer of .*: .* is not a valid JSON file"),
        ("model.safetensors", "no weights", "the model .*: SafetensorError"),
    ],
)
def test_broken_files_are_named(name, content, what, tmp_path):
    save_model(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=f"cannot load {what}"):
        load_model(str(tmp_path))


def test_the_longest_input(tmp_path, model_folder):
    assert longest_input(str(model_folder)) == 128
    with pytest.raises(ValueError, match=r"has no config.json: expected the folder of a transformers model"):
        longest_input(str(tmp_path))
