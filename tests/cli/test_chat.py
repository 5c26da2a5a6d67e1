"""Conversations as tokens: the loss counts what the assistant says, up to the end of its turn, and nothing else."""

import pytest
from transformers import AutoTokenizer
from trl.chat_template_utils import qwen3_chat_template

from ntk_attention.cli.chat import chat_tokens
from ntk_attention.cli.data import Item, Message, prompt_tokens
from ntk_attention.cli.encoding import encode, encode_all

PLAIN = (
    "{% for m in messages %}<start>{{ m.role }}\n{{ m.content }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<start>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<start>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<end>"
    "{% endgeneration %}{% else %}{{ m.content }}<end>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<start>assistant\n{% endif %}"
)
WITHOUT_END = MARKED.replace("<end>{% endgeneration %}", "{% endgeneration %}<end>")
NO_END = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
FORGETS = PLAIN.replace("{{ m.content }}", "{{ m.content if loop.last else m.content | upper }}")

ITEM = Item(
    (
        Message("system", "be short"),
        Message("user", "hi"),
        Message("assistant", "yes, so"),
        Message("user", "häh?"),
    ),
    "no",
)


@pytest.fixture
def tokenizer(start_folder):
    tokenizer = AutoTokenizer.from_pretrained(start_folder)
    tokenizer.chat_template = PLAIN
    return tokenizer


@pytest.fixture(scope="module")
def start_folder(tmp_path_factory):
    from tests.tiny import save_tokenizer

    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"), "<start> $A <end>")


def counted(row, tokenizer):
    """The texts that the loss counts, one for each run."""
    runs, last = [], None
    for i, label in enumerate(row["labels"]):
        if label != -100:
            assert label == row["input_ids"][i]
            runs += [[]] if last != i - 1 else []
            runs[-1].append(label)
            last = i
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize("template", [PLAIN, MARKED, WITHOUT_END], ids=["plain", "marked", "marked without the end"])
def test_answers_are_counted_and_end(template, tokenizer):
    tokenizer.chat_template = template
    row = chat_tokens(ITEM, tokenizer)
    assert counted(row, tokenizer) == ["yes, so<end>", "no<end>"]
    assert tokenizer.decode(row["input_ids"]) == (
        "<start>system\nbe short<end>\n<start>user\nhi<end>\n<start>assistant\nyes, so<end>\n<start>user\nhäh?<end>\n"
        "<start>assistant\nno<end>"
    )
    only_last = Item(ITEM.prompt, ITEM.completion, all_answers=False)
    assert counted(chat_tokens(only_last, tokenizer), tokenizer) == ["no<end>"]


@pytest.mark.parametrize("template", [PLAIN, MARKED], ids=["plain", "marked"])
def test_what_is_read_before_an_answer_is_what_is_trained(template, tokenizer):
    tokenizer.chat_template = template
    row = encode(ITEM, tokenizer, 200)
    prompt = prompt_tokens(ITEM.prompt, tokenizer)
    assert row["input_ids"][: len(prompt)] == prompt
    assert tokenizer.decode(row["input_ids"][len(prompt) :]) == "no<end>"


def test_a_template_without_an_end_gets_one(tokenizer):
    tokenizer.chat_template = NO_END
    assert counted(chat_tokens(ITEM, tokenizer), tokenizer) == ["yes, so", "no<end>"]


def test_turns_that_are_written_otherwise_later(tokenizer):
    """TRL knows the template of Qwen3, which takes thoughts out of earlier turns; one nobody knows is refused."""
    tokenizer.chat_template = qwen3_chat_template
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    empty = "<think>\n\n</think>\n\n"
    row = chat_tokens(ITEM, tokenizer)
    assert counted(row, tokenizer) == [f"{empty}yes, so<|im_end|>", f"{empty}no<|im_end|>"]
    assert tokenizer.decode(row["input_ids"]).endswith("no<|im_end|>")
    tokenizer.chat_template = FORGETS
    with pytest.raises(ValueError, match="writes earlier turns of a conversation otherwise"):
        chat_tokens(ITEM, tokenizer)
    one = Item(ITEM.prompt[:2], "no")
    with pytest.raises(ValueError, match=r"x.jsonl, line 3: the chat template writes earlier turns"):
        encode_all([Item(one.prompt, "no", place="x.jsonl, line 3")], tokenizer, 200)


def test_what_a_template_refuses_is_named(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(ValueError, match=r"the chat template of the model refuses the prompt .*: no system role"):
        chat_tokens(ITEM, tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="the model has no chat template, which conversations and system prompts need"):
        chat_tokens(ITEM, tokenizer)


def test_marks_without_an_answer_are_refused(tokenizer):
    tokenizer.chat_template = MARKED.replace("'assistant'", "'model'")
    tokenizer.chat_template += "{% generation %}{% endgeneration %}"
    with pytest.raises(ValueError, match="makes 0 answers of 2 turns of the assistant"):
        chat_tokens(ITEM, tokenizer)
