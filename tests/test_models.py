"""Loading of base models: tokenizers that a conversion has spoiled."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from ntk_attention.models import check_tokenizer

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
