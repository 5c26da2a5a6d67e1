"""Where items come from: every format in every kind of file, and one line for what is wrong, with its place."""

import json
import re
import shlex
from pathlib import Path

import datasets
import pytest

from ntk_attention.cli.data import Item, Message
from ntk_attention.cli.formats import ALPACA
from ntk_attention.cli.sources import load_data
from ntk_attention.cli.tasks import EMBEDDED_TASKS

PAIRS = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]
ITEMS = [Item("a", "b"), Item("c", "d")]


def user(text):
    return Message("user", text)


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """What `datasets` keeps of a file goes here."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


# --- files ---

FILES = {
    "lines.jsonl": lines(PAIRS),
    "empty lines.jsonl": "\n" + lines(PAIRS).replace("\n", "\r\n\n"),
    "mark.jsonl": b"\xef\xbb\xbf" + lines(PAIRS).encode(),
    "array.json": json.dumps(PAIRS),
    "pretty.json": json.dumps(PAIRS, indent=2),
    "lines.json": lines(PAIRS),
    "table.csv": "prompt,completion\na,b\nc,d\n",
    "table.tsv": "completion\tprompt\nb\ta\n\nd\tc\n",
    "mark.csv": b"\xef\xbb\xbfprompt,completion\r\na,b\r\nc,d\r\n",
}


@pytest.mark.parametrize("name", FILES)
def test_files(name, tmp_path):
    source = write(tmp_path / name, FILES[name])
    data = load_data(source)
    assert data.items == ITEMS
    assert (data.read_as, data.is_document) == ("prompt and completion", False)
    assert load_data(source, 1).items == ITEMS[:1]


def test_places_are_lines_of_the_file(tmp_path):
    """Where a row begins, also in arrays over many lines and in tables with lines inside of a field."""
    table = 'prompt,completion\n"a\nb",c\nd,e\n'
    array = json.dumps(PAIRS, indent=1)
    for name, content, places in (
        ("x.csv", table, [2, 4]),
        ("x.json", array, [2, 6]),
        ("x.jsonl", "\n" + lines(PAIRS), [2, 3]),
    ):
        source = write(tmp_path / name, content)
        assert [item.place for item in load_data(source).items] == [f"{source}, line {i}" for i in places]


def test_strings_stay_what_they_are(tmp_path):
    """What looks like a date, a number or nothing at all."""
    values = ["2024-05-01", "007", "NA", "null", "1e3", " x "]
    rows = [{"prompt": value, "completion": value} for value in values]
    table = "prompt,completion\n" + "".join(f"{value},{value}\n" for value in values)
    for name, content in (("x.jsonl", lines(rows)), ("x.json", json.dumps(rows)), ("x.csv", table)):
        assert [item.prompt for item in load_data(write(tmp_path / name, content)).items] == values


def test_parquet(tmp_path, cached):
    path = tmp_path / "x.parquet"
    datasets.Dataset.from_list(PAIRS).to_parquet(path)
    for options in ({}, {"size": 2, "streaming": True}):
        data = load_data(str(path), **options)
        assert data.items == ITEMS
        assert data.items[1].place == f"{path}, row 2"
    with pytest.raises(ValueError, match="streaming reads the first rows: say how many with items"):
        load_data(str(path), streaming=True)
    write(path, b"PAR1 but not really")
    with pytest.raises(ValueError, match=r"no data at '.*x.parquet': ArrowInvalid"):
        load_data(str(path))


def test_folders(tmp_path):
    """All files of one split, told by their names."""
    write(tmp_path / "one" / "a.jsonl", lines(PAIRS[:1]))
    write(tmp_path / "one" / "b.csv", "prompt,completion\nc,d\n")
    write(tmp_path / "one" / "README.md", "words")
    assert load_data(str(tmp_path / "one")).items == ITEMS
    write(tmp_path / "two" / "train.jsonl", lines(PAIRS[:1]))
    write(tmp_path / "two" / "test.jsonl", lines(PAIRS[1:]))
    assert load_data(str(tmp_path / "two")).items == ITEMS[:1]
    assert load_data(f"{tmp_path / 'two'}:test").items == ITEMS[1:]
    with pytest.raises(ValueError, match=r"has no split 'dev' .*found the splits \['test', 'train'\]"):
        load_data(f"{tmp_path / 'two'}:dev")
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match=r"has no files to train on: expected files that end in one of .jsonl, .json"):
        load_data(str(tmp_path / "none"))
    write(tmp_path / "one" / "c.txt", "words")
    with pytest.raises(ValueError, match="holds texts and tables"):
        load_data(str(tmp_path / "one"))


def test_folders_that_datasets_saved(tmp_path):
    data = datasets.Dataset.from_list(PAIRS)
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": data.select([0]), "test": data.select([1])}).save_to_disk(tmp_path / "two")
    assert load_data(str(tmp_path / "one")).items == ITEMS
    assert load_data(str(tmp_path / "two")).items == ITEMS[:1]
    assert load_data(f"{tmp_path / 'two'}:test").items == ITEMS[1:]
    for split, message in ((":dev", r"expected one of the splits \['train', 'test'\], got 'dev'"), (":a:b", "got 'b'")):
        with pytest.raises(ValueError, match=f"{message}|no data"):
            load_data(f"{tmp_path / 'two'}{split}")


def test_the_hub(tmp_path, monkeypatch):
    """The loader is that of `datasets`; instead of the hub it gets files."""
    source = write(tmp_path / "data.jsonl", lines(PAIRS))
    asked = []

    def load_dataset(name, config=None, *, split, streaming, load=datasets.load_dataset):
        asked.append((name, config, split, streaming))
        files = {"train": source, "test": source}
        return load("json", data_files=files, split=split, streaming=streaming, cache_dir=tmp_path / "cache")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_data("some/set").items == ITEMS
    assert load_data("some/set:test").items[0].place == "some/set:test, row 1"
    assert load_data("some/set:main:test", 1, streaming=True).items == ITEMS[:1]
    assert asked == [
        ("some/set", None, "train", False),
        ("some/set", None, "test", False),
        ("some/set", "main", "test", True),
    ]
    with pytest.raises(ValueError, match=r"no data at 'some/set:dev': ValueError: Unknown split \"dev\""):
        load_data("some/set:dev")
    with pytest.raises(ValueError, match="expected name, name:split or name:config:split"):
        load_data("a:b:c:d")


def test_a_hub_that_is_not_reached():
    with pytest.raises(ValueError, match=r"no data at 'some/set': \w+: .*(reach|offline|find)"):
        load_data("some/set")


@pytest.mark.parametrize("name", EMBEDDED_TASKS)
def test_embedded_tasks(name):
    first, again, other = (load_data(name, 5, seed).items for seed in (1, 1, 2))
    assert first == again != other
    assert len(first) == 5
    with pytest.raises(ValueError, match="streaming is for the hub and parquet files"):
        load_data(name, 5, streaming=True)


def test_texts(tmp_path):
    source = write(tmp_path / "text.txt", b"\xef\xbb\xbfone\r\ntwo")
    data = load_data(source)
    assert data.items == [Item("", "one\ntwo")]
    assert data.is_document


# --- formats ---

TURNS = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": "a"},
    {"role": "user", "content": "r"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "no answer"},
]
SHARED = [
    {"from": {"user": "human", "assistant": "gpt"}.get(t["role"], t["role"]), "value": t["content"]} for t in TURNS
]
HISTORY = (Message("system", "s"), user("q"), Message("assistant", "a"), user("r"))
PARTS = [
    {"role": "user", "content": [{"type": "text", "text": "x"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "y"}, {"type": "text", "text": "z"}]},
]
FORMATS = {
    "messages": ({"messages": TURNS}, Item(HISTORY, "b")),
    "ShareGPT": ({"conversations": SHARED, "id": 1}, Item(HISTORY, "b")),
    "roles in conversations": ({"conversations": TURNS}, Item(HISTORY, "b")),
    "system beside": ({"system": "s", "conversations": SHARED[1:]}, Item(HISTORY, "b")),
    "parts": ({"messages": PARTS}, Item((user("x"),), "yz")),
    "greeting": ({"messages": TURNS[2:3]}, Item((), "a")),
    "prompt, system": (
        {"system": "s", "prompt": "q", "completion": "a"},
        Item((Message("system", "s"), user("q")), "a"),
    ),
    "no system": ({"system": "", "prompt": "q", "completion": "a"}, Item("q", "a")),
    "chat pair": ({"prompt": TURNS[:4], "completion": TURNS[4:5]}, Item(HISTORY, "b", all_answers=False)),
    "Alpaca": ({"instruction": "do", "input": "this", "output": "done", "text": "x"}, Item("do\n\nthis", "done")),
    "no input": ({"instruction": "do", "input": "", "output": "done"}, Item("do", "done")),
    "text": ({"text": "words"}, Item("", "words", is_whole=True)),
    "no prompt": ({"prompt": "", "completion": "words"}, Item("", "words")),
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_formats(name, suffix, tmp_path, cached):
    row, item = FORMATS[name]
    path = tmp_path / f"x{suffix}"
    if suffix == ".parquet":  # where every message gets the fields of all
        datasets.Dataset.from_list([row]).to_parquet(path)
    else:
        write(path, lines([row]))
    assert load_data(str(path)).items == [item]


def test_alpaca_without_a_chat_template(tmp_path):
    source = write(tmp_path / "x.jsonl", lines([{"instruction": "do", "input": "this", "output": "done"}]))
    item = load_data(source, has_template=False).items[0]
    assert item.prompt.startswith(ALPACA[:40])
    assert item.prompt.endswith("### Instruction:\ndo\n\n### Input:\nthis\n\n### Response:\n")


def test_what_is_not_read_is_said(tmp_path):
    rows = [{**PAIRS[0], "id": 1}, {**PAIRS[1], "source": "x"}]
    assert load_data(write(tmp_path / "x.jsonl", lines(rows))).read_as == "prompt and completion; not read: id, source"


# --- what is wrong ---

TOOL = [{"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}]
PICTURE = [{"role": "user", "content": [{"type": "image", "url": "x"}]}]
BAD = {
    "nothing.jsonl": (None, "no data at .*expected one of .*chain-sum.*a file that ends in one of .jsonl"),
    "data.xls": ("a,b", "expected a file that ends in one of .jsonl, .json, .csv, .tsv, .parquet, .txt"),
    "empty.jsonl": (" \n", "empty.jsonl is empty"),
    "empty.json": (" \n", "empty.json is empty"),
    "none.json": ("[]", "none.json is empty: expected rows"),
    "empty.csv": ("", "empty.csv is empty"),
    "header.csv": ("prompt,completion\n", "header.csv is empty"),
    "empty.txt": (b"\xef\xbb\xbf \r\n", "empty.txt is empty"),
    "binary.jsonl": (
        b"\x89PNG\r\n\x1a\n\xff",
        r"line 1: .*binary.jsonl is not UTF-8 text \(invalid start byte at byte 0",
    ),
    "latin.jsonl": (lines(PAIRS).encode() + b'{"prompt": "\xe4"}', "line 3: .* is not UTF-8 text"),
    "latin.csv": (b"prompt,completion\na,\xe4\n", "line 2: .* is not UTF-8 text"),
    "latin.txt": (b"\xff\xfe\x00", "latin.txt is not UTF-8 text"),
    "half.jsonl": (lines(PAIRS[:1]) + '{"prompt": ', "line 2: not JSON"),
    "half.json": (json.dumps(PAIRS, indent=1)[:-20], "line 8: not JSON"),
    "comma.json": ('[{"prompt": "a", "completion": "b"}\n{}]', "line 2: not JSON .expected , or ]"),
    "list.jsonl": ("[1]", "line 1: expected an object with fields, got list"),
    "strings.json": ('["a"]', "line 1: expected an object with fields, got str"),
    "nan.jsonl": ("NaN", "line 1: expected an object with fields, got float"),
    "deep.jsonl": ("[" * 100_000, "line 1: JSON that cannot be read"),
    "digits.jsonl": ('{"prompt": ' + "1" * 5000 + "}", "line 1: JSON that cannot be read"),
    "surrogate.jsonl": (r'{"prompt": "\ud800", "completion": "b"}', "line 1: the field 'prompt' holds half of a surr"),
    "type.jsonl": ('{"prompt": 3, "completion": "b"}', r"line 1: the field 'prompt' must be a string, got 3 \(int\)"),
    "both.jsonl": ('{"prompt": "", "completion": ""}', "line 1: prompt and completion are both empty"),
    "answer.jsonl": (lines([PAIRS[0], {"prompt": "a", "completion": " "}]), "line 2: the completion is empty"),
    "fields.jsonl": (
        lines([{"a": 1, "b": 2}]),
        "line 1: the fields a, b are no format that is known: expected prompt and",
    ),
    "no fields.jsonl": ("{}", "line 1: there is no field, which is no format that is known"),
    "column.csv": ("prompt,answer\na,b\n", "line 2: the fields prompt, answer are no format"),
    "columns.csv": ("prompt,completion\na,b\na,b,c\n", "line 3: has 3 columns, the first line names 2"),
    "twice.csv": ("prompt,prompt\na,b\n", "line 1: two columns have one name, got prompt, prompt"),
    "quote.csv": ('prompt,completion\na,"b\n', "line 2: not a table .unexpected end of data"),
    "missing.jsonl": (lines([PAIRS[0], {"prompt": "a"}]), "line 2: the field 'completion' must be a string, got None"),
    "mixed.jsonl": (
        lines([PAIRS[0], {"messages": TURNS}]),
        "line 2: has messages, the rows before have prompt and compl",
    ),
    "no answer.jsonl": (
        lines([{"messages": TURNS[:2]}]),
        "line 1: messages has no turn of the assistant.*system, user",
    ),
    "no turn.jsonl": (lines([{"messages": []}]), "line 1: messages has no turn of the assistant.*got no messages"),
    "empty answer.jsonl": (
        lines([{"messages": [*TURNS[:2], {"role": "assistant", "content": ""}]}]),
        r"messages\[2\], a t",
    ),
    "speaker.jsonl": (
        lines([{"messages": [{"role": "robot", "content": "x"}]}]),
        r"messages\[0\] is said by 'robot': expec",
    ),
    "string.jsonl": (
        lines([{"messages": "hello"}]),
        "line 1: the field 'messages' must be a list of messages, got hello",
    ),
    "strings.jsonl": (
        lines([{"messages": ["hello"]}]),
        r"messages\[0\] must be an object with role and content, got hel",
    ),
    "content.jsonl": (
        lines([{"messages": [{"role": "user"}]}]),
        r"messages\[0\] must have its text in 'content', got None",
    ),
    "tool.jsonl": (lines([{"messages": TOOL}]), r"messages\[0\] has tool_calls, which is not read here"),
    "tools.jsonl": (lines([{"messages": TURNS, "tools": ["f"]}]), "line 1: the field 'tools' is not read here"),
    "picture.jsonl": (lines([{"messages": PICTURE}]), r"messages\[0\] has a part that is no text"),
    "pair.jsonl": (lines([{"prompt": TURNS[:2], "completion": TURNS[:1]}]), "must be one message of the assistant"),
    "output.jsonl": (lines([{"instruction": "do", "output": ""}]), "line 1: the output is empty"),
    "text.jsonl": (lines([{"text": " "}]), "line 1: the text is empty"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files(name, tmp_path):
    content, message = BAD[name]
    source = str(tmp_path / name) if content is None else write(tmp_path / name, content)
    with pytest.raises(ValueError, match=message) as error:
        load_data(source)
    assert str(tmp_path / name) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.jsonl", lines([{"id": 7, "question": "a", "answer": "b"}, {"id": 8, "question": "c", "answer": "d"}])),
        ("x.json", json.dumps([{"q1": "a", "q2": "b"}, {"q1": "c", "q2": "d"}])),
        ("x.csv", "question,answer\na,b\nc,d\n"),
        ("x.tsv", "question\tanswer\na\tb\nc\td\n"),
    ],
)
def test_the_conversion_that_an_error_proposes_works(name, content, tmp_path, cached, monkeypatch):
    with pytest.raises(ValueError, match="To convert: ") as error:
        load_data(write(tmp_path / name, content))
    program, option, code = shlex.split(re.split("To convert: ", str(error.value))[1])
    assert (program, option) == ("python", "-c")
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert load_data(str(Path("converted.jsonl"))).items == ITEMS


def test_numbers_of_items(tmp_path):
    with pytest.raises(ValueError, match="expected a positive number of items, got 0"):
        load_data("chain-sum", 0)
    with pytest.raises(ValueError, match="read line by line: streaming is for the hub"):
        load_data(write(tmp_path / "x.jsonl", lines(PAIRS)), 1, streaming=True)
