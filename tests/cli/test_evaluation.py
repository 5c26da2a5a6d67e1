"""Answers: what the model reads for them, and how they are scored."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ntk_attention.cli import evaluation
from ntk_attention.cli.data import Item
from ntk_attention.cli.encoding import encode, encode_all
from ntk_attention.cli.evaluation import answers, check_room, figures, share_right, stop_tokens
from tests.tiny import save_model


@pytest.fixture(scope="module")
def model_and_tokenizer(tmp_path_factory):
    folder = save_model(tmp_path_factory.mktemp("start"), "<start> $A <end>")
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("template", [None, "<start>{{ messages[0].content }}:"], ids=["plain", "chat"])
def test_answers_read_what_training_reads(model_and_tokenizer, padding_side, template, monkeypatch):
    model, tokenizer = model_and_tokenizer
    monkeypatch.setattr(tokenizer, "padding_side", padding_side)
    monkeypatch.setattr(tokenizer, "chat_template", template)
    prompts, seen = ["a", "bcd", "ef"], []
    generate = model.generate

    def watched(input_ids, attention_mask, **options):
        seen.extend(row[mask.bool()].tolist() for row, mask in zip(input_ids, attention_mask, strict=True))
        return generate(input_ids=input_ids, attention_mask=attention_mask, **options)

    monkeypatch.setattr(model, "generate", watched)
    together = answers(model, tokenizer, prompts, max_new_tokens=5)
    for prompt, ids in zip(prompts, seen, strict=True):
        row = encode(Item(prompt, "x"), tokenizer, 20)
        assert ids == [i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label == -100]
        assert ids.count(tokenizer.convert_tokens_to_ids("<start>")) == 1
        assert tokenizer.eos_token_id not in ids
    assert together == [answers(model, tokenizer, [prompt], max_new_tokens=5)[0] for prompt in prompts]


def test_a_text_is_read_with_the_start_that_it_is_trained_with(model_and_tokenizer):
    """The loss of a plain text is that of the tokens which the tokenizer gives, without the end."""
    model, tokenizer = model_and_tokenizer
    ids = torch.tensor([tokenizer("some text")["input_ids"][:-1]])
    expected = model(input_ids=ids, labels=ids).loss.item()
    rows = encode_all([Item("", "some text")], tokenizer, 20)
    assert evaluation.mean_loss(model, rows, tokenizer.pad_token_id) == pytest.approx(expected, rel=1e-5)


def test_share_right(model_and_tokenizer, monkeypatch):
    texts = {"a": " 12\n", "b": "It is 12.", "c": "It is 13", "d": "twelve"}
    monkeypatch.setattr(evaluation, "answers", lambda m, t, prompts, *_: [texts[prompt] for prompt in prompts])
    items = [Item(prompt, "12") for prompt in texts]
    assert share_right(*model_and_tokenizer, items, "exact_match") == 1 / 4
    assert share_right(*model_and_tokenizer, items, "final_number") == 2 / 4
    mixed = [*items[:2], Item("", "a text that nobody asks for")]
    rows = encode_all(mixed, model_and_tokenizer[1], 40)
    assert figures(*model_and_tokenizer, rows, mixed[:2], "exact_match")["exact_match"] == 1 / 2
    assert figures(*model_and_tokenizer, rows, [], "exact_match").keys() == {"loss"}


def test_an_answer_ends_where_the_model_says_as_well(model_and_tokenizer, monkeypatch):
    """As where the end of a turn is another token than that of a text."""
    model, tokenizer = model_and_tokenizer
    assert stop_tokens(model, tokenizer) == [tokenizer.eos_token_id]
    first = answers(model, tokenizer, ["a"], 1)[0]
    monkeypatch.setattr(model.generation_config, "eos_token_id", tokenizer(first, add_special_tokens=False).input_ids)
    assert answers(model, tokenizer, ["a"], 5) == [first]


def test_room_for_an_answer(model_and_tokenizer):
    _, tokenizer = model_and_tokenizer
    check_room(["abc", "a"], tokenizer, 6, 10)
    with pytest.raises(ValueError, match=r"a prompt of 4 tokens and an answer of max_new_tokens = 7 are more .*, 10"):
        check_room(["a", "abc"], tokenizer, 7, 10)
    with pytest.raises(ValueError, match="max_new_tokens must be positive, got 0"):
        check_room([], tokenizer, 0, 10)
