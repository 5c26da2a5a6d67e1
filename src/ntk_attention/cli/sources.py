"""Where training data come from: files, folders, the hub, the embedded tasks.

Lines of JSON and tables of text are read here, with the line of every row for errors: the loaders of `datasets` do not
know it, and take strings that look like dates or numbers for such. Parquet, folders that `datasets` has saved and the
hub are read by `datasets`.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from ..progress import Reporter, Silent
from .data import Item
from .formats import Fields, format_of, read_row
from .tasks import EMBEDDED_TASKS

Rows = Iterator[tuple[str, Fields]]  # place and fields of each row
TASK_ITEMS = 2000  # of an embedded task, which has no end
SHOWN_EVERY = 100  # rows


@dataclass(frozen=True)
class Data:
    """The items of a source.

    Args:
        source: a name or a path, as given.
        items: in its order.
        read_as: the format, and the fields that it does not read.
        is_document: whether they are texts of any length, to be cut into pieces.
    """

    source: str
    items: list[Item]
    read_as: str
    is_document: bool = False


def load_data(
    source: str,
    size: int | None = None,
    seed: int = 0,
    *,
    has_template: bool = True,
    streaming: bool = False,
    reporter: Reporter | None = None,
) -> Data:
    """Items of an embedded task, a file, a folder or a dataset of the hub.

    Args:
        source: a name in EMBEDDED_TASKS; a file that ends in .jsonl, .json, .csv, .tsv, .parquet or .txt; a folder of
            such files, or one that `datasets` saved, with `:split` where there are several; or a name on the hub, as
            `name`, `name:split` or `name:config:split`.
        size: the first so many rows; all by default, and TASK_ITEMS of an embedded task.
        seed: of an embedded task.
        has_template: whether the model has a chat template.
        streaming: read no more of the hub and of parquet files than these rows.
        reporter: is told of every row.

    Raises:
        ValueError: if the source is unknown or empty, or if a row is not what its format asks for; the message names
            the place.
    """
    reporter = reporter or Silent()
    if size is not None and size < 1:
        raise ValueError(f"expected a positive number of items, got {size}")
    if streaming and size is None:
        raise ValueError("streaming reads the first rows: say how many with items")
    if source in EMBEDDED_TASKS:
        if streaming:
            raise ValueError(f"{source} is made here: streaming is for the hub and parquet files")
        return Data(source, EMBEDDED_TASKS[source](size or TASK_ITEMS, seed), "prompt and completion")
    reporter.stage(f"read {source}")
    files = files_of(source)
    if streaming and not all(file.suffix == ".parquet" for file in files or ()):
        raise ValueError(f"{source} is read line by line: streaming is for the hub and parquet files")
    if files and {file.suffix for file in files} == {".txt"}:
        texts = [Item("", read_text(file), place=str(file)) for file in files]
        return Data(source, texts, "plain text", is_document=True)
    if files is None:
        rows = hub_rows(source, streaming)
    else:
        rows = chain.from_iterable(READERS[file.suffix](file, streaming) for file in files)
    return items_of(source, islice(rows, size), has_template, reporter)


def items_of(source: str, rows: Rows, has_template: bool, reporter: Reporter) -> Data:
    """The items of rows that have the format of the first one."""
    first = next(rows, None)
    if first is None:
        raise ValueError(f"{source} is empty: expected rows")
    known = format_of(first[1], first[0], source)
    read, unread = (*known.needed, *known.optional), dict[str, None]()
    items = []
    for place, fields in chain([first], rows):
        items.append(read_row(fields, known, place, has_template))
        unread |= dict.fromkeys(name for name in fields if name not in read)
        if len(items) % SHOWN_EVERY == 0:
            reporter.advance(SHOWN_EVERY)
    beside = f"; not read: {', '.join(map(str, unread))}" if unread else ""
    return Data(source, items, f"{known.name}{beside}")


# --- files ---


def files_of(source: str) -> list[Path] | None:
    """The files behind a source, and None for what `datasets` is asked for: a dataset it has saved, or the hub.

    Raises:
        ValueError: if it looks like a path and is none, or holds nothing that is read here.
    """
    path, split = path_and_split(source)
    suffixes = ", ".join((*READERS, ".txt"))
    if path.is_dir():
        return None if is_saved(path) else files_of_folder(path, split)
    if path.is_file():
        if path.suffix not in READERS and path.suffix != ".txt":
            raise ValueError(f"{source}: expected a file that ends in one of {suffixes}")
        return [path]
    if path.suffix in (*READERS, ".txt") or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise ValueError(
            f"no data at {source!r}: expected one of {sorted(EMBEDDED_TASKS)}, a file that ends in one of {suffixes}, "
            "a folder of such files or a name on the hub"
        )
    return None


def path_and_split(source: str) -> tuple[Path, str | None]:
    """A folder may be followed by the name of a split."""
    before, _, split = source.rpartition(":")
    if not Path(source).exists() and before and Path(before).is_dir():
        return Path(before), split
    return Path(source), None


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` of `datasets` has made the folder."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def files_of_folder(folder: Path, split: str | None) -> list[Path]:
    """The files of one split, told by their names as `datasets` tells them; of all where they name none."""
    from datasets.data_files import DataFilesDict, EmptyDatasetError, get_data_patterns

    try:
        found = DataFilesDict.from_patterns(get_data_patterns(str(folder)), base_path=str(folder))
    except (EmptyDatasetError, FileNotFoundError):
        found = {}
    splits = {
        str(name): sorted(path for path in map(Path, paths) if path.suffix in (*READERS, ".txt"))
        for name, paths in found.items()
    }
    splits = {name: paths for name, paths in splits.items() if paths}
    chosen = splits.get(split or "train")
    if chosen is None:
        raise ValueError(
            f"{folder} has no {'files' if split is None else f'split {split!r}'} to train on: expected files that end "
            f"in one of {', '.join((*READERS, '.txt'))}, found the splits {sorted(splits) or 'none'}"
        )
    if ".txt" in {path.suffix for path in chosen} and len({path.suffix for path in chosen}) > 1:
        raise ValueError(f"{folder} holds texts and tables: expected one kind, or one folder for each")
    return chosen


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, which is not empty, without the mark of byte order that some editors begin with."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    if not text.strip():
        raise ValueError(f"{path} is empty: expected a text")
    return text


def lines_of(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file with their ends, one by one."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            try:
                yield raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                reason = f"{error.reason} at byte {error.start}"
                raise ValueError(f"{path}, line {number}: {path} is not UTF-8 text ({reason})") from None


def json_lines(path: Path, streaming: bool = False) -> Rows:
    """One object a line; empty lines do not count."""
    for number, line in enumerate(lines_of(path), start=1):
        if line.strip():
            place = f"{path}, line {number}"
            yield place, as_object(parsed(line, place), place)


def parsed(line: str, place: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: not JSON ({error.msg} at column {error.colno})") from None
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, brackets in brackets
        raise ValueError(f"{place}: JSON that cannot be read ({error})") from None


def as_object(value: Any, place: str) -> Fields:
    if not isinstance(value, dict):
        raise ValueError(f"{place}: expected an object with fields, got {type(value).__name__}")
    return value


def json_file(path: Path, streaming: bool = False) -> Rows:
    """An array of objects, or lines of them."""
    text = read_text(path)
    if not text.lstrip().startswith("["):
        yield from json_lines(path)
        return
    decoder, line = json.JSONDecoder(), 1
    at = text.index("[") + 1
    line += text.count("\n", 0, at)
    while True:
        start = end_of_space(text, at)
        line += text.count("\n", at, start)
        place = f"{path}, line {line}"
        if text[start : start + 1] == "]":
            return
        try:
            value, at = decoder.raw_decode(text, start)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {error.lineno}: not JSON ({error.msg} at column {error.colno})") from None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{place}: JSON that cannot be read ({error})") from None
        yield place, as_object(value, place)
        line += text.count("\n", start, at)
        after = end_of_space(text, at)
        line += text.count("\n", at, after)
        if text[after : after + 1] not in (",", "]"):
            raise ValueError(f"{path}, line {line}: not JSON (expected , or ] after an object)")
        at = after + (text[after] == ",")


def end_of_space(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def table_rows(path: Path, streaming: bool = False) -> Rows:
    """A table whose first line names the columns; the place of a row is the line that it begins in."""
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(lines_of(path), delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
    number = 1
    try:
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise ValueError(f"{path}, line 1: two columns have one name, got {', '.join(header)}")
        number = reader.line_num + 1
        for row in reader:
            place = f"{path}, line {number}"
            number = reader.line_num + 1
            if len(row) not in (0, len(header)):
                raise ValueError(f"{place}: has {len(row)} columns, the first line names {len(header)}")
            if row:
                yield place, dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise ValueError(f"{path}, line {number}: not a table ({error})") from None


# --- what `datasets` reads ---


def parquet_rows(path: Path, streaming: bool = False) -> Rows:
    from datasets import load_dataset

    yield from dataset_rows(
        str(path), lambda: load_dataset("parquet", data_files=str(path), split="train", streaming=streaming)
    )


def hub_rows(source: str, streaming: bool) -> Rows:
    """Of a dataset that `datasets` has saved, or of one on the hub."""
    from datasets import DatasetDict, load_dataset, load_from_disk

    path, split = path_and_split(source)
    if path.is_dir():

        def load() -> Any:
            data = load_from_disk(path)
            if isinstance(data, DatasetDict):
                if (split or "train") not in data:
                    raise ValueError(f"expected one of the splits {list(data)}, got {split or 'train'!r}")
                return data[split or "train"]
            if split is not None:
                raise ValueError(f"it has no splits, got {split!r}")
            return data

        yield from dataset_rows(source, load)
        return
    name, *rest = source.split(":")
    if len(rest) > 2 or not all(rest):
        raise ValueError(f"{source}: expected name, name:split or name:config:split")
    config = rest[0] if len(rest) == 2 else None
    yield from dataset_rows(
        source, lambda: load_dataset(name, config, split=rest[-1] if rest else "train", streaming=streaming)
    )


def dataset_rows(source: str, load: Callable[[], Any]) -> Rows:
    try:
        for number, row in enumerate(load(), start=1):
            yield f"{source}, row {number}", without_none(row)
    except Exception as error:  # of pyarrow, of the hub, of the net
        reason = error.__cause__ or error
        raise ValueError(
            f"no data at {source!r}: {type(reason).__name__}: {' '.join(str(reason).split())[:300]}"
        ) from None


def without_none(value: Any) -> Any:
    """Arrow gives every message the fields of all of them, empty where one has none."""
    if isinstance(value, Mapping):
        return {name: without_none(x) for name, x in value.items() if x is not None}
    return [without_none(x) for x in value] if isinstance(value, list) else value


READERS: dict[str, Callable[[Path, bool], Rows]] = {
    ".jsonl": json_lines,
    ".json": json_file,
    ".csv": table_rows,
    ".tsv": table_rows,
    ".parquet": parquet_rows,
}
