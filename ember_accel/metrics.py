"""Metrics: how right an output is, as plain functions of `(output, expected)`.

    from ember_accel import evaluate, numeric

    report = await evaluate(models.gpt4, rows, numeric)

An output is a text, a value, or what a model or `predict` returns: a `Reply` counts by its data,
a `Prediction` by its text. A row without an expected value, or with one that the metric cannot
read, is a ValueError: it becomes a failure of the report, not a silent 0.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import contextlib
import decimal
import enum
import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import ember
from ember import Fn

# ── 1. Values ─── any output, or its text


def _value(output: Any) -> Any:
    """What counts of an output: a network's answer, a reply's data, an enum's value, or itself."""
    networks = (ember.Consensus, ember.Verdict, ember.Verification)
    output = output.answer if issubclass(type(output), networks) else output
    output = output.data if issubclass(type(output), ember.Reply) else output
    if issubclass(type(output), list) and ember.Reply in map(type, output):
        raise ValueError(f"{len(output)} replies are no output. Take one, as by majority_vote")
    return output.value if isinstance(output, enum.Enum) else output


def _text(output: Any) -> str:
    """The text of an output."""
    return str(_value(output))


def _texts(expected: Any) -> list[str]:
    """The texts that are right: those in a list, or the one."""
    if expected is None:
        raise ValueError("this row has no expected value, which the metric needs")
    return [_text(one) for one in (expected if ember._is_list(expected) else [expected])]


def exact(output: Any, expected: Any) -> bool:
    r"""Whether the output equals what is expected, or one of a list: by value, or as a text.

    A number and the text of one are compared as numbers; a bool is also `true` or `false`.

    >>> exact(" Paris\n", "Paris"), exact(42, "42.0"), exact("paris", ["Paris", "Lutetia"])
    (True, True, False)
    """
    value = _value(output)
    if value is None or expected is None or value == expected:
        return bool(value == expected)
    return any(_same(value, one) for one in (expected if ember._is_list(expected) else [expected]))


def _same(value: Any, expected: Any) -> bool:
    """Whether two values have the same text, or mean the same number or bool."""
    texts = [_text(one).strip() for one in (value, expected)]
    given = (value, _value(expected))
    if any(isinstance(one, bool) for one in given):
        texts = [text.lower() for text in texts]
    elif any(isinstance(one, int | float) for one in given):
        with contextlib.suppress(ArithmeticError):  # no number
            return decimal.Decimal(texts[0]) == decimal.Decimal(texts[1]) or texts[0] == texts[1]
    return texts[0] == texts[1]


def contains(output: Any, expected: Any) -> bool:
    r"""Whether what is expected, or one of a list, is in the output, but for case and spaces.

    >>> contains("It is\nNew  York.", "new york")
    True
    """
    texts = [_text(output), *_texts(expected)]
    whole, *wanted = (" ".join(text.casefold().split()) for text in texts)
    return any(text in whole for text in wanted)


def f1(output: Any, expected: Any) -> float:
    """How many words are shared with what is expected, as SQuAD counts; of a list, the best.

    Case, punctuation and articles do not count.

    >>> f1("The Eiffel Tower, in Paris", "eiffel tower")
    0.6666666666666666
    """
    best = 0.0
    for text in _texts(expected):
        ours, theirs = _words(_text(output)), _words(text)
        shared = 2 * (ours & theirs).total()
        best = max(best, shared / (ours + theirs).total() if shared else float(ours == theirs))
    return best


def _words(text: str) -> Counter[str]:
    """The words of a text that count."""
    words = re.sub(r"[^\w\s]|_", "", text.lower()).split()
    return Counter(word for word in words if word not in {"a", "an", "the"})


# ── 2. Numbers ─── the last one, or the one that is marked

# A number, but not the 2 of H2O and of m^2; the minus of 5-3 is no sign. Then a/b, or per cent.
_NUMBER = re.compile(
    r"((?<![\w)])-)?[$€£¥]?(?<![^\W_])(?<!\^)((?:\d{1,3}(?:,\d{3})+(?!\d)|\d+|(?=\.\d))"
    r"(?:\.\d+)?(?:[eE][-+]?\d+)?)(?:\s?/\s?(\d+(?:\.\d+)?))?(\s?\\?%|\s?percent)?"
)
# \boxed{72} or #### 72, but not the title "#### 2. Compute".
_FINAL = re.compile(
    r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}|####\s*(?!\d+[.):][ \t]+\S)([-$€£¥]*\.?\d\S*)"
)
_AS_PLAIN = {  # of LaTeX and typography
    "[\u2212\u2013]": "-",
    r"\\[dt]?frac\s*\{([^{}]+)\}\s*\{([^{}]+)\}": r"\1/\2",
    r"\s?(?:\u00d7|x|\*|\\times|\\cdot)\s*10\s*\^\s*\{?([-+]?\d+)\}?": r"e\1",
    r"(?<=\d)(?:\{,\}|\\[,!])(?=\d{3})": ",",
}


def numeric(output: Any, expected: Any, tolerance: float = 1e-6) -> bool:
    r"""Whether the last number in the output is the expected one, but for `tolerance` of it.

    A number in \boxed{} or after #### comes first. 3/4 and 50% are numbers; 50% is 50, and 0.5.

    >>> numeric("So she pays $1,234.50.", 1234.5), numeric("It is 3/4", "0.75")
    (True, True)
    """
    wanted, found = _number(expected), _number(output)
    if not wanted:
        raise ValueError(f"numeric: expected={expected!r:.80} has no number")
    pairs = [(a, b) for a in wanted for b in found]
    pairs = pairs[:1] if len(wanted) == len(found) else pairs
    return any(math.isclose(a, b, rel_tol=tolerance) for a, b in pairs)


def _number(output: Any) -> tuple[float, ...]:
    """What the number that an output settles on can mean; () where it has none."""
    text = _text(output)
    for form, plain in _AS_PLAIN.items():
        text = re.sub(form, plain, text)
    finals = ["".join(groups) for groups in _FINAL.findall(text)]
    for sign, digits, below, percent in _NUMBER.findall(finals[-1] if finals else text)[-1:]:
        value = float(sign + digits.replace(",", "")) / (float(below or 1) or math.nan)
        return (value, value / 100) if percent else (value,)
    return ()


# ── 3. Letters ─── the one that is stated, or marked

# A letter. A and I are words where another follows, and small letters where no point does.
_LETTER = (
    r"((?:[B-HJ-Z]|[AI](?!\s+(?!(?:and|as|based|because|but|due|for|from|given|in|not|since|which"
    r"|with)\b)[a-z]))(?![^\W_]|['\u2019]\w)"
    r"|[a-z](?=[\s*_]*(?:[.,;:!)\]*_}\"'`$]+(?:\s|$)|$)))"
)
_GAP = r"[\W_]*(?:(?:boxed|text\w*|math\w+|option|choice|letter|answer)[\W_]+){0,4}"
_STATED = [  # as the answer
    rf"\b(?i:answer\b[^.\n]{{0,40}}?\b(?:is|be|was)\b){_GAP}{_LETTER}",
    rf"\b(?i:(?:option|choice)(?:\s+[a-z]{{2,}}){{0,3}}?\s+(?:is|was)\b){_GAP}{_LETTER}",
    rf"\b(?i:answer|option|choice)\b\W{{0,9}}[:=>→-]{_GAP}{_LETTER}",
    rf"(?:\\boxed|\b[Ii]t(?:['\u2019]s| is| must be| should be)){_GAP}{_LETTER}",
    r"\b([A-Z])[)\]*_]*\s+(?:is|fits)\s+(?:the\s+)?(?:most\s+)?(?:correct|right|best|answer)\b",
]
_NOT = r"(?<!\bnot )(?<!n't )"
_ENDS = r"(?![)\]*_]*\s+(?:is|are|was))"
_CHOSEN = [  # of several, or by itself in a line
    rf"{_NOT}\b(?i:but|choose|hence|pick|select|so|therefore|thus|with){_GAP}{_LETTER}{_ENDS}",
    rf"{_NOT}\b(?i:option|choice|letter|answer)[\W_]+{_LETTER}{_ENDS}",
    r"^[^\w\n]*([A-Z])[^\w\n]*$",
]
_OPENING = r"\A[^\w\n]*([A-Za-z])[).:*][^\n]*\n\s*\n"  # what explains it comes in a new paragraph
_MARKED = [
    rf"{_NOT}\(([A-Za-z])\)",
    rf"{_NOT}(?<![\w(])([A-Za-z])\)",
    rf"{_NOT}[*_`\"“\[]([A-Z])[.:]?[*_`\"”\]]",
    rf"{_NOT}^[^\w\n]*([A-Z])[.:,]\s",
]


def choice(output: Any, expected: Any) -> bool:
    r"""Whether the output settles on the expected letter of a multiple choice.

    That is the last that it states as its answer ("the answer is B", "Answer: B", \boxed{B}), else
    the last that it chooses ("option B", "so B") or marks ("(B)", "B)", "**B**"), or all of it.

    >>> choice("The answer is not A, it is B.", "B"), choice("A good question. I think (C)", "A")
    (True, False)
    """
    wanted = _letter(expected)
    if not wanted:
        raise ValueError(f"choice: expected={expected!r:.80} names no letter, such as 'B'")
    return _letter(output) == wanted


def _letter(output: Any) -> str:
    """The letter that an output settles on, in upper case; "" where it names none."""
    text = _text(output)
    if alone := re.fullmatch(r"[\W_]*([A-Za-z])[\W_]*", text):
        return alone[1].upper()
    marked = [_OPENING] if re.match(_OPENING, text) else _MARKED
    for patterns in (_STATED, [*_CHOSEN, *marked]):
        matches = [one for each in patterns for one in re.finditer(each, text, re.MULTILINE)]
        if matches:
            return max(matches, key=lambda match: match.start(1))[1].upper()
    return ""


# ── 4. Models as judges ─── where no rule can tell


def graded(model: Any, criteria: str | Sequence[str] = "") -> Fn[[Any, Any], float]:
    """An async metric: 1.0 where a model finds an output correct by what is expected, else 0.0.

    >>> metric = graded(models.gpt4, "Other words for the same are correct.")
    """
    signature = "criteria: str, expected: str, answer: str -> correct: bool"
    grade: Any = ember.predict(signature, model=model, reasoning=True)
    told = criteria if isinstance(criteria, str) else "\n".join(criteria)
    told = told or "Correct is what says the same as the expected answer."

    async def graded(output: Any, expected: Any) -> float:
        wanted = "\n".join(_texts("" if expected is None else expected))
        verdict = await grade(told, wanted, _text(output))
        return float(verdict.correct)

    return graded
