"""When an answer is right: as text, or as mathematics."""

from __future__ import annotations

import re
from fractions import Fraction

from ntk_attention.cli.data import NUMBER

FRACTION = re.compile(r"(-?)(\d*)\\frac\{(-?\d+)\}\{(\d+)\}")
SPACE = re.compile(r"(?<!\\)\\[!,;: ]|\\q?quad|[\s~$]")
MADE_LARGE = re.compile(r"\\(left|right|[bB]ig[lrg]*)(?![a-zA-Z])")
DEGREES = re.compile(r"\^(\{\\circ\}|\\circ)|\\(%|\$)|%")
WORDS = re.compile(r"\\(text|textbf|mathrm|mbox|textrm|textit)\{([^{}]*)\}")
NAMED = re.compile(r"^[a-zA-Z](\\in|=)|^[a-zA-Z]\([a-z]\)=")
THOUSANDS = re.compile(r"(?<![\d.])-?\d{1,3}(,\d{3})+(?![\d,])")


def same_text(generated: str, expected: str) -> bool:
    """Up to case, spaces around and a full stop."""
    first, second = (text.strip().rstrip(".").lower() for text in (generated, expected))
    return first == second


def same_answer(generated: str, expected: str) -> bool:
    """What stands after '####', up to spaces."""
    first, second = ("".join(text.rsplit("####", 1)[-1].split()) for text in (generated, expected))
    return first == second


def same_mathematics(generated: str, expected: str) -> bool:
    r"""Whether a solution ends in the expected answer, both in LaTeX.

    Spaces, brackets' sizes, units, degrees, \dfrac and the like do not count; numbers and fractions of whole numbers
    are compared by value, lists without brackets in any order. Expressions that are equal by algebra alone are not.
    """
    return equal(plain(final_answer(generated)), plain(expected))


def final_answer(text: str) -> str:
    """What stands in the last box, or after '####', or after 'answer is', or the last number."""
    if "\\boxed" in text:
        return boxed(text)
    if "####" in text:
        return text.rsplit("####", 1)[1].strip().split("\n")[0]
    if (said := re.findall(r"answer is:?\s*([^\n]+)", text, re.IGNORECASE)) and said[-1].strip():
        inside = re.search(r"\$([^$]+)\$|\\\((.+?)\\\)", said[-1])
        return (inside[1] or inside[2]) if inside else said[-1].rstrip(". ")
    numbers = NUMBER.findall(text)
    return numbers[-1] if numbers else text


def boxed(solution: str) -> str:
    """What stands in the last \\boxed{...}, braces balanced; the whole text where there is none."""
    start = solution.rfind("\\boxed{")
    if start < 0:
        return solution.strip()
    depth = 0
    for i in range(start + len("\\boxed"), len(solution)):
        depth += {"{": 1, "}": -1}.get(solution[i], 0)
        if depth == 0:
            return solution[start + len("\\boxed{") : i].strip()
    return solution[start:].strip()


def plain(answer: str) -> str:
    """An answer without what does not count."""
    text = re.sub(r"\\[dt]frac", r"\\frac", answer.strip().rstrip("."))
    text = MADE_LARGE.sub("", text.replace("{,}", ",").replace("\\(", "").replace("\\)", ""))
    unit = re.search(r"\s*\\(text|mbox|mathrm)\{", text)
    if unit and re.fullmatch(r"[-+\d.,/\\{}a-z\s]*\d[}\s]*", text[: unit.start()]):
        text = text[: unit.start()]  # words behind a number are its unit
    text = DEGREES.sub("", WORDS.sub(r"\2", text).replace("\\$", ""))
    text = SPACE.sub("", text)
    text = NAMED.sub("", text)
    text = re.sub(r"\\frac(\d)(\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac(\d)\{", r"\\frac{\1}{", re.sub(r"(\\frac\{[^{}]*\})(\d)", r"\1{\2}", text))
    text = re.sub(r"\\sqrt(\w)", r"\\sqrt{\1}", text)
    text = re.sub(r"(?<![\w.])(-?\d+)/(\d+)(?![\w.])", r"\\frac{\1}{\2}", text)
    return THOUSANDS.sub(lambda found: found[0].replace(",", ""), text) if "(" not in text else text


def equal(first: str, second: str) -> bool:
    if first == second:
        return True
    parts = [at_commas(text) for text in (first, second)]
    if len(parts[0]) != len(parts[1]):
        return False
    if len(parts[0]) > 1:
        rest = list(parts[1])
        for part in parts[0]:
            found = next((i for i, other in enumerate(rest) if equal(part, other)), None)
            if found is None:
                return False
            rest.pop(found)
        return True
    ends = [(text[:1], text[-1:]) for text in (first, second)]
    if ends[0] == ends[1] and ends[0][0] in ("(", "[") and ends[0][1] in (")", "]"):
        inside = [at_commas(text[1:-1]) for text in (first, second)]
        return len(inside[0]) == len(inside[1]) and all(map(equal, *inside)) and len(inside[0]) > 1
    values = [value(text) for text in (first, second)]
    return values[0] is not None and values[0] == values[1]


def at_commas(text: str) -> list[str]:
    """Parts between the commas that no bracket holds."""
    parts, depth = [""], 0
    for c in text:
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(c, 0)
        if c == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += c
    return parts


def value(text: str) -> Fraction | None:
    """Of a whole number, a decimal one, a fraction or a mixed number."""
    if re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)", text):
        return Fraction(text.rstrip("."))
    if found := FRACTION.fullmatch(text):
        sign, whole, above, below = found.groups()
        if int(below):
            size = Fraction(int(whole or 0)) + Fraction(int(above), int(below))
            return -size if sign else size
    return None
