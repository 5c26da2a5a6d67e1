"""What is trained on and what is measured with: counts, lengths, packing."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ntk_attention.cli.data import Item, Message, collate
from ntk_attention.cli.encoding import encode_all
from ntk_attention.cli.settings import Settings
from ntk_attention.cli.sources import Data
from ntk_attention.cli.splits import Split, asked_items, encode_split, in_pieces, pack, split_items, table
from ntk_attention.cli.work import check_packing, describe_data, prepare
from ntk_attention.progress import SILENT
from tests.tiny import adapted

LETTERS = [Item(f"{a}{b}", a) for a in "abcdef" for b in "0123456789"]


@pytest.fixture(scope="module")
def tokenizer(model_folder):
    return AutoTokenizer.from_pretrained(model_folder)


def settings(**options):
    return Settings("model", "data", **options)


def encoded(items, tokenizer, limit=128, **options):
    """All items as the training part, beside two that are short."""
    split = Split(items, [Item("v", "v")], [Item("t", "t")])
    return encode_split(split, settings(**options), tokenizer, limit)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_all_items_are_used():
    split = split_items(settings(), LETTERS)
    assert (len(split.train), len(split.validation), len(split.test), split.repeated) == (40, 10, 10, 0)
    assert {*split.train, *split.validation, *split.test} == set(LETTERS)


def test_data_to_evaluate_on():
    """All of theirs, or as many as asked for; what they repeat is not trained on."""
    others = [Item(f"x{i}", "x") for i in range(100)] + LETTERS[:5]
    split = split_items(settings(), LETTERS, others)
    assert (len(split.train), len(split.validation), len(split.test), split.repeated) == (55, 52, 53, 5)
    assert not set(split.train) & set(others)
    split = split_items(settings(held_out=20), LETTERS, others)
    assert (len(split.validation), len(split.test)) == (20, 20)


def test_too_long(tokenizer):
    items = [Item("a", "b"), Item("a", "b" * 20, place="x.jsonl, line 2"), Item("a" * 20, "b"), Item("c", "d")]
    message = r"x.jsonl, line 2: an item has 22 tokens, --max-length is 10 .2 of 6 items are longer.: --too-long drop"
    with pytest.raises(ValueError, match=message):
        encoded(items, tokenizer, max_length=10)
    with pytest.raises(ValueError, match="an item has 22 tokens, the model takes 12"):
        encoded(items, tokenizer, 12)
    split, rows = encoded(items, tokenizer, max_length=10, too_long="drop")
    assert (split.train, split.dropped, split.shortened) == ([items[0], items[3]], 2, 0)
    assert len(rows["train"]) == 2
    split, rows = encoded(items, tokenizer, max_length=10, too_long="cut")  # a prompt alone teaches nothing
    assert (split.train, split.dropped, split.shortened) == ([items[0], items[1], items[3]], 1, 1)
    assert tokenizer.decode(rows["train"][1]["input_ids"]) == "a" + "b" * 9
    assert split.train_tokens == 3 + 10 + 3
    with pytest.raises(ValueError, match="no items left for training, validation and test"):
        encoded(items[1:3], tokenizer, max_length=3, too_long="drop")


def test_texts_are_cut_and_lose_nothing(tokenizer):
    texts = [Item("", "ab" * 50, is_whole=True), Item("", "cd", is_whole=True), Item("ask" * 50, "answer")]
    found = in_pieces(Data("x", texts, "text"), tokenizer, 128, 32)
    assert "".join(item.completion for item in found[:-2]) == "ab" * 50
    assert found[-2:] == texts[1:]
    assert sum(item.is_whole for item in found) == 2
    assert in_pieces(Data("x", texts, "text"), tokenizer, 128, size=1) == texts[:1]
    assert len(in_pieces(Data("x", texts[:1], "text", is_document=True), tokenizer, 128, 16, size=3)) == 3


def test_other_data_have_another_digest(tokenizer):
    digests = {encoded(items, tokenizer)[0].digest for items in (LETTERS, LETTERS[::-1], LETTERS[1:], LETTERS)}
    assert len(digests) == 3


# --- which are asked ---


def test_who_is_asked(tokenizer):
    items = [Item("a", "b"), Item((Message("user", "c"),), "d"), Item("", "text")]
    tokenizer.chat_template = "{{ messages[0].content }}"
    assert asked_items(items, tokenizer, "exact_match", 4, 128) == items[:2]
    tokenizer.chat_template = None
    long = [Item("a", "b" * 9), Item("b", "b" * 9), Item("c", "c")]
    assert asked_items(long, tokenizer, "exact_match", 4, 128) == []  # no answer of 4 tokens is one of 9
    assert asked_items(long, tokenizer, "final_number", 4, 128) == long
    with pytest.raises(ValueError, match="a prompt of 1 tokens and an answer of max_new_tokens = 9 are more"):
        asked_items(long, tokenizer, "exact_match", 9, 8)
    assert asked_items([Item("a" * 9, "b"), Item("b", "c")], tokenizer, "exact_match", 4, 8, "drop") == [Item("b", "c")]


# --- packing ---


@pytest.mark.parametrize("positions", ["free", "rotary"])
def test_packed_items_are_computed_as_alone(model_folder, tokenizer, positions):
    items = [Item("ab", "cd"), Item("", "some text"), Item("abc", "d" * 7), Item("x", "y")]
    rows = encode_all(items, tokenizer, 100)
    packed = pack(table(rows), 16)
    assert 1 < len(packed) < len(rows)
    model = adapted(AutoModelForCausalLM.from_pretrained(model_folder), positions=positions)
    with torch.no_grad():
        alone = [model(**collate([row], 0)) for row in rows]
        together = model(**collate(packed.to_list(), 0))
    sums = [
        out.loss.item() * sum(label != -100 for label in row["labels"][1:])
        for out, row in zip(alone, rows, strict=True)
    ]
    count = sum(label != -100 for row in rows for label in row["labels"][1:])
    assert together.loss.item() == pytest.approx(sum(sums) / count, rel=1e-5)
    ids, places = packed["input_ids"][0], packed["position_ids"][0]
    second = places.index(0, 1)
    for row, out in zip(rows, alone, strict=True):
        if row["input_ids"] == ids[:second]:
            torch.testing.assert_close(together.logits[0, :second], out.logits[0], rtol=1e-4, atol=1e-5)
        if row["input_ids"] == ids[second : second + len(row["input_ids"])]:
            size = len(row["input_ids"])
            torch.testing.assert_close(together.logits[0, second : second + size], out.logits[0], rtol=1e-4, atol=1e-5)


def test_a_model_that_does_not_keep_packed_items_apart_is_refused(model_folder, tokenizer, monkeypatch):
    rows = pack(table(encode_all(LETTERS[:4], tokenizer, 100)), 16).to_list()
    model = adapted(AutoModelForCausalLM.from_pretrained(model_folder))
    check_packing(model, rows, 0)
    forward = type(model.get_base_model()).forward

    def without_positions(self, *args, position_ids=None, **kwargs):
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model.get_base_model()), "forward", without_positions)
    with pytest.raises(
        ValueError, match="LlamaForCausalLM lets items of a packed row see each other: leave packing out"
    ):
        check_packing(model, rows, 0)


# --- all of it ---


def test_preparation_says_what_there_is(model_folder, tmp_path):
    rows = [{"prompt": item.prompt, "completion": item.completion, "id": i} for i, item in enumerate(LETTERS)]
    rows += [{"prompt": "long" * 20, "completion": "x"}]
    chosen = Settings(
        str(model_folder),
        write(tmp_path / "a.jsonl", rows),
        eval_data=write(tmp_path / "b.jsonl", rows[:12]),
        max_length=32,
        too_long="drop",
        packing=True,
        max_new_tokens=4,
    )
    _, work = prepare(chosen, SILENT)
    said = describe_data(work.found, chosen)
    for text in (
        "data: 48 train, 6 validation, 6 test; 192 tokens to train on; read as prompt and completion; not read: id",
        "12 left out of training, which are held out as well",
        "too long: 1 dropped, 0 cut",
        "packed into 6 rows of 32 tokens",
    ):
        assert text in said
    assert len(work.rows["calibration"]) == 48
    assert sum(len(row["input_ids"]) for row in work.rows["train"]) == 192
