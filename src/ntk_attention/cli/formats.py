"""The formats of training data: which fields a row may have, and what item they make."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .data import Item, Message, with_system

Fields = Mapping[str, Any]

# The prompt that Alpaca was made with, for models without a chat template.
ALPACA = (
    "Below is an instruction that describes a task{}. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{}\n\n{}### Response:\n"
)
SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
# What changes a conversation and is not read here.
UNREAD = ("tool_calls", "tool_call_id", "function_call", "reasoning_content", "thinking", "weight")
# How other data call what is asked and what is answered: for the conversion that an error proposes.
ASKED = ("question", "query", "instruction", "input", "source", "problem", "context", "article", "user", "q")
ANSWERED = ("answer", "response", "output", "target", "solution", "completion", "summary", "label", "chosen", "a")
SHOWN = 60  # characters of a value in an error


@dataclass(frozen=True)
class Format:
    """Fields that a row must have, those that it may have, and what it becomes.

    Args:
        read: gets a row, and whether the model has a chat template.
    """

    name: str
    needed: tuple[str, ...]
    optional: tuple[str, ...]
    read: Callable[[Fields, bool], Item]

    def fits(self, fields: Iterable[str]) -> bool:
        return set(self.needed) <= set(fields)


# --- what a field may be ---


def is_given(value: Any) -> bool:
    return value is not None and value != "" and value != []


def text_of(fields: Fields, name: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str):
        kind = "" if value is None else f" ({type(value).__name__})"
        raise ValueError(f"the field {name!r} must be a string, got {str(value)[:SHOWN]}{kind}")
    return checked(value, f"the field {name!r}")


def checked(text: str, what: str) -> str:
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise ValueError(f"{what} holds half of a surrogate pair, which is no character")
    return text


def messages_of(fields: Fields, name: str) -> list[Message]:
    """The turns of a conversation, written as role and content or as ShareGPT's from and value."""
    turns = fields.get(name)
    if not isinstance(turns, list | tuple):
        raise ValueError(f"the field {name!r} must be a list of messages, got {str(turns)[:SHOWN]}")
    if is_given(fields.get("tools")):
        raise ValueError("the field 'tools' is not read here: expected conversations without tools")
    return [message_of(turn, f"{name}[{i}]") for i, turn in enumerate(turns)]


def message_of(turn: Any, place: str) -> Message:
    if not isinstance(turn, Mapping):
        raise ValueError(f"{place} must be an object with role and content, got {str(turn)[:SHOWN]}")
    unread = [name for name in UNREAD if is_given(turn.get(name))]
    if unread:
        raise ValueError(f"{place} has {', '.join(unread)}, which is not read here: expected role and content alone")
    role, content = ("from", "value") if "from" in turn and "role" not in turn else ("role", "content")
    if turn.get(role) not in SPEAKERS:
        raise ValueError(f"{place} is said by {turn.get(role)!r}: expected one of {', '.join(SPEAKERS)}")
    said = turn.get(content)
    if isinstance(said, list):
        if not all(isinstance(part, Mapping) and part.get("type") == "text" for part in said):
            raise ValueError(f"{place} has a part that is no text, got {str(said)[:SHOWN]}")
        said = "".join(str(part.get("text") or "") for part in said)
    if not isinstance(said, str):
        raise ValueError(f"{place} must have its text in {content!r}, got {str(said)[:SHOWN]}")
    return Message(SPEAKERS[turn[role]], checked(said, place))


def system_of(fields: Fields) -> str | None:
    """The row's own system prompt."""
    return text_of(fields, "system") if is_given(fields.get("system")) else None


# --- the formats ---


def read_conversation(fields: Fields, name: str) -> Item:
    """All turns up to the last answer; what comes after it teaches nothing."""
    messages = messages_of(fields, name)
    if (system := system_of(fields)) is not None:
        messages.insert(0, Message("system", system))
    answers = [i for i, message in enumerate(messages) if message.role == "assistant"]
    if not answers:
        said = ", ".join(message.role for message in messages) or "no messages"
        raise ValueError(f"{name} has no turn of the assistant, which is what is trained: got {said}")
    for i in answers:
        if not messages[i].content.strip():
            raise ValueError(f"{name}[{i}], a turn of the assistant, is empty")
    return Item(tuple(messages[: answers[-1]]), messages[answers[-1]].content)


def read_pair(fields: Fields, has_template: bool) -> Item:
    if isinstance(fields.get("prompt"), list):
        return read_conversational_pair(fields)
    prompt, completion = text_of(fields, "prompt"), text_of(fields, "completion")
    if not completion.strip():
        raise ValueError("prompt and completion are both empty" if not prompt else "the completion is empty")
    return Item(with_system(system_of(fields), prompt) if prompt else "", completion)


def read_conversational_pair(fields: Fields) -> Item:
    """A prompt of several messages, none of which is trained, and one answer."""
    prompt, completion = messages_of(fields, "prompt"), messages_of(fields, "completion")
    if [message.role for message in completion] != ["assistant"] or not completion[0].content.strip():
        raise ValueError("the completion of a conversation must be one message of the assistant, with a text")
    return Item(tuple(prompt), completion[0].content, all_answers=False)


def read_instruction(fields: Fields, has_template: bool) -> Item:
    instruction, output = text_of(fields, "instruction"), text_of(fields, "output")
    given = text_of(fields, "input") if is_given(fields.get("input")) else ""
    if not instruction.strip() or not output.strip():
        raise ValueError(f"the {'output' if instruction.strip() else 'instruction'} is empty")
    if has_template:
        return Item(with_system(system_of(fields), f"{instruction}\n\n{given}" if given else instruction), output)
    beside = ", paired with an input that provides further context" if given else ""
    prompt = ALPACA.format(beside, instruction, f"### Input:\n{given}\n\n" if given else "")
    return Item(with_system(system_of(fields), prompt), output)


def read_text(fields: Fields, has_template: bool) -> Item:
    text = text_of(fields, "text")
    if not text.strip():
        raise ValueError("the text is empty")
    return Item("", text, is_whole=True)


# In the order in which they are looked for: data that also hold the conversation written out have it in `text`.
FORMATS = (
    Format("messages", ("messages",), ("system",), lambda fields, _: read_conversation(fields, "messages")),
    Format("ShareGPT", ("conversations",), ("system",), lambda fields, _: read_conversation(fields, "conversations")),
    Format("prompt and completion", ("prompt", "completion"), ("system",), read_pair),
    Format("Alpaca", ("instruction", "output"), ("input", "system"), read_instruction),
    Format("plain text", ("text",), (), read_text),
)
KNOWN = (
    "prompt and completion; messages; conversations (ShareGPT); instruction and output, with or without input "
    "(Alpaca); text"
)


def format_of(fields: Fields, place: str, source: str) -> Format:
    """The format of a row.

    Raises:
        ValueError: if it has none; the message names the fields, the formats and a conversion.
    """
    found = [name for name, value in fields.items() if value is not None]
    for known in FORMATS:
        if known.fits(found):
            return known
    names = f"the fields {', '.join(map(str, found))} are" if found else "there is no field, which is"
    raise ValueError(f"{place}: {names} no format that is known: expected {KNOWN}.{conversion(found, source)}")


def conversion(names: list[str], source: str) -> str:
    """A line for the shell that makes a file of a known format out of this one, by the names of its fields."""
    if not names:
        return ""
    asked = next((name for name in ASKED if name in names), names[0])
    answered = next((name for name in ANSWERED if name in names and name != asked), None)
    answered = answered or next((name for name in names if name != asked), None)
    renamed = {asked: "text"} if answered is None else {asked: "prompt", answered: "completion"}
    renamed = {old: new for old, new in renamed.items() if old != new}
    suffix = Path(source).suffix.lstrip(".")
    builders = {"jsonl": "json", "tsv": "csv"}
    if suffix in ("json", "jsonl", "csv", "tsv", "parquet"):
        of = f"{json.dumps(builders.get(suffix, suffix))}, data_files={json.dumps(source)}"
        of += ', sep="\\t"' if suffix == "tsv" else ""
    else:
        of = json.dumps(source.split(":")[0])
    code = (
        f'from datasets import load_dataset; load_dataset({of}, split="train").rename_columns({json.dumps(renamed)})'
        '.to_json("converted.jsonl")'
    )
    return f" To convert: python -c {shlex.quote(code)}"


def read_row(fields: Fields, known: Format, place: str, has_template: bool) -> Item:
    """The item of a row, in the format of the first one.

    Raises:
        ValueError: if the row has another format, or is not what that asks for; the message names its place.
    """
    missing = [name for name in known.needed if fields.get(name) is None]
    other = next((f for f in FORMATS if f.fits(name for name, value in fields.items() if value is not None)), None)
    if missing and other is not None:
        raise ValueError(
            f"{place}: has {' and '.join(other.needed)}, the rows before have {' and '.join(known.needed)}: expected "
            "one format for all"
        )
    try:
        item = known.read(fields, has_template)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None
    return Item(item.prompt, item.completion, item.all_answers, item.is_whole, place)
