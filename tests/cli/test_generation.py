"""Answers that are shown while they are written, sampled or not, and conversations."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from ntk_attention.cli import generation
from ntk_attention.cli.data import Message, prompt_tokens
from ntk_attention.cli.evaluation import answers
from ntk_attention.cli.generation import check_sampling, converse, room_for, write_answer
from ntk_attention.cli.main import app
from tests.tiny import adapted

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


@pytest.fixture(scope="module")
def model(model_folder):
    return adapted(AutoModelForCausalLM.from_pretrained(model_folder))


@pytest.fixture
def tokenizer(model_folder):
    return AutoTokenizer.from_pretrained(model_folder)


def test_an_answer_is_written_as_it_comes(model, tokenizer):
    """In several parts, which are together what `answers` gives."""
    parts = []
    text = write_answer(model, tokenizer, "some words", 20, parts.append)
    assert text == "".join(parts) == answers(model, tokenizer, ["some words"], 20)[0]
    assert sum(bool(part) for part in parts) > 1 or len(text.split()) < 2


def test_sampling(model, tokenizer):
    def sample(seed, **options):
        torch.manual_seed(seed)
        return write_answer(model, tokenizer, "some words", 20, lambda text: None, **options)

    greedy = sample(0)
    assert sample(0, temperature=2.0) == sample(0, temperature=2.0)
    assert len({greedy, *(sample(seed, temperature=2.0) for seed in range(4))}) == 5
    assert sample(3, temperature=2.0, top_p=1e-6) == greedy  # the likeliest token alone
    assert sample(1) == greedy


@pytest.mark.parametrize(
    ("temperature", "top_p", "message"),
    [
        (float("nan"), 1.0, "temperature must be finite and not negative, got nan"),
        (1.0, 0.0, "top_p must be above 0 and at most 1, got 0"),
        (0.0, 0.9, "top_p is for sampling: give a temperature above 0 with it"),
    ],
)
def test_bad_sampling(temperature, top_p, message):
    with pytest.raises(ValueError, match=message):
        check_sampling(temperature, top_p)


def test_room():
    assert room_for([1] * 100, None, 128) == 28
    assert room_for([1], None, 10**6) == generation.ANSWER
    assert room_for([1] * 100, 28, 128) == 28
    with pytest.raises(ValueError, match="a prompt of 100 tokens and an answer of max_new_tokens = 29 are more than"):
        room_for([1] * 100, 29, 128)


def test_a_conversation_knows_what_was_said(model, tokenizer, monkeypatch):
    tokenizer.chat_template = TEMPLATE
    seen, lines = [], iter(["hello", "  ", "and then?"])

    def write_answer(model, tokenizer, prompt, room, write, **sampling):
        seen.append((tuple(prompt), room, sampling))
        write("yes")
        return " yes "

    def read():
        line = next(lines, None)
        if line is None:
            raise EOFError
        return line

    monkeypatch.setattr(generation, "write_answer", write_answer)
    written = []
    converse(model, tokenizer, read, written.append, 128, system="be short", temperature=0.5)
    first = (Message("system", "be short"), Message("user", "hello"))
    second = (*first, Message("assistant", "yes"), Message("user", "and then?"))
    room = 128 - len(prompt_tokens(second, tokenizer))
    assert [prompt for prompt, *_ in seen] == [first, second]
    assert seen[1][1:] == (room, {"temperature": 0.5})
    assert "".join(written) == "yes\nyes\n"


def test_a_conversation_ends_where_there_is_no_room(model, tokenizer):
    tokenizer.chat_template = TEMPLATE
    with pytest.raises(ValueError, match="more than the model takes, 128"):
        converse(model, tokenizer, lambda: "x" * 60, lambda text: None, 128)


def test_the_command(model, model_folder, tmp_path):
    """With a template, of a run in float32 or not; without a prompt it reads lines until the end of its input."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokenizer.chat_template = TEMPLATE
    AutoModelForCausalLM.from_pretrained(model_folder).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    call = ["generate", str(tmp_path / "adapter"), "--model", str(tmp_path / "base"), "--max-new-tokens", "5"]
    result = CliRunner().invoke(app, [*call, "hello", "--system", "s", "--temperature", "1", "--top-p", "0.9"])
    assert result.exit_code == 0, result.output
    assert "base model:   " in result.output
    assert "\nwith adapter: " in result.output
    result = CliRunner().invoke(app, call, input="hello\nand then?\n")
    assert result.exit_code == 0, result.output
    assert result.output.count("> ") >= 3
