"""The spine: tools, typed output, images, embeddings, and what is added up over all of it."""

import asyncio
import dataclasses
import enum
import json
import threading
from collections.abc import Callable
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal

import anyio
import httpx
import pytest
import trio
from pydantic import BaseModel, Field
from server import anthropic_answer, openai_answer
from typing_extensions import TypedDict

import ember
from ember import CallError, Model, ReplyError, SetupError, model

PNG = b"\x89PNG\r\n\x1a\n" + bytes(8)
USAGE = {"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12}


class Script:
    """Answers in turn, the last one for ever, and the bodies that were sent."""

    def __init__(self, *answers: Any) -> None:
        self.answers, self.bodies = list(answers), list[dict[str, Any]]()

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.bodies.append(json.loads(request.content))
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, httpx.Response):
            return answer
        body = answer if isinstance(answer, dict) else openai_answer(answer) | {"usage": USAGE}
        return httpx.Response(200, json=body)


def played(*answers: Any, name: str = "openai:gpt-4o", **fields: Any) -> tuple[Model, Script]:
    """A model that gets these answers, and the script that it plays."""
    script = Script(*answers)
    transport = httpx.MockTransport(script)
    return model(name, transport=transport, **{"api_key": "sk-12345678"} | fields), script


def asked(*calls: tuple[str, Any]) -> dict[str, Any]:
    """An answer that asks for tools."""
    tools = [
        {"id": f"c{n}", "type": "function", "function": {"name": name, "arguments": text}}
        for n, (name, text) in enumerate(calls)
    ]
    message = {"role": "assistant", "content": None, "tool_calls": tools}
    choice = {"index": 0, "message": message, "finish_reason": "tool_calls"}
    return {"id": "1", "model": "gpt-4o", "choices": [choice], "usage": USAGE}


async def double(x: int) -> int:
    """Twice x."""
    return 2 * x


def half(x: float, *, up: bool = False) -> float:
    """Half of x."""
    return x / 2 + up


# ── Tools ───


async def test_tools_run_side_by_side_and_their_results_go_back_in_order() -> None:
    together = [anyio.Event(), anyio.Event()]

    async def first() -> str:
        together[0].set()
        await together[1].wait()
        return "one"

    async def second() -> dict[str, int]:
        together[1].set()
        await together[0].wait()
        return {"two": 2}

    ask, script = played(asked(("first", "{}"), ("second", "")), "done")
    reply = await ask("go", tools=[first, second], timeout=5)
    assert (reply.text, reply.tool_calls) == ("done", ())
    assert [m["content"] for m in script.bodies[1]["messages"][-2:]] == ["one", '{"two":2}']
    assert [m["tool_call_id"] for m in script.bodies[1]["messages"][-2:]] == ["c0", "c1"]


async def test_a_plain_function_runs_in_a_thread_and_arguments_are_read_by_their_types() -> None:
    threads = set[int]()

    def where(day: date, *, up: bool = True) -> str:
        threads.add(threading.get_ident())
        return f"{day.year} {up}"

    ask, script = played(asked(("where", '{"day": "2026-11-21"}')), "done")
    await ask("go", tools=[where])
    assert script.bodies[1]["messages"][-1]["content"] == "2026 True"
    assert threads.isdisjoint({threading.get_ident()})


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (("half", '{"x": "much"}'), "valid number"),
        (("half", '{"y": 1}'), "unexpected"),
        (("half", "{"), "the arguments are no JSON object"),
        (("half", "[1]"), "the arguments are no JSON object"),
        (("whole", "{}"), "no tool is named 'whole', only half, broken"),
        (("broken", "{}"), "Error: ZeroDivisionError: division by zero"),
    ],
)
async def test_what_a_tool_raises_is_its_result(call: tuple[str, str], said: str) -> None:
    def broken() -> float:
        return 1 / 0

    ask, script = played(asked(call, ("half", '{"x": 3, "up": true}')), "sorry")
    assert (await ask("go", tools=[half, broken])).text == "sorry"
    wrong, right = script.bodies[1]["messages"][-2:]
    assert said in wrong["content"]
    assert right["content"] == "2.5"


async def test_a_model_that_never_stops_calling_is_stopped_before_its_tools_run_again() -> None:
    ran = list[int]()

    async def more(x: int) -> int:
        ran.append(x)
        return x

    ask, script = played(asked(("more", '{"x": 1}')))
    with pytest.raises(ReplyError, match=r"openai gpt-4o: .*max_steps=3 steps\. Set it higher"):
        await ask("go", tools=[more], max_steps=3)
    assert (len(script.bodies), len(ran)) == (3, 2)


async def test_tools_given_as_schemas_are_left_to_the_caller() -> None:
    schema = {"type": "function", "function": {"name": "search", "parameters": {"type": "object"}}}
    ask, script = played(asked(("search", '{"q": "x"}')), "unused")
    reply = await ask("go", tools=[double, schema])
    assert reply.tool_calls == (ember.ToolCall("c0", "search", {"q": "x"}),)
    assert len(script.bodies) == 1
    assert script.bodies[0]["tools"][1] == schema


async def test_a_tool_that_hangs_ends_with_the_call() -> None:
    ask, _ = played(asked(("wait", "{}")), "unused")

    async def wait() -> None:
        await anyio.sleep_forever()

    with pytest.raises(CallError, match=r"no whole answer within timeout=0\.05 s"):
        await ask("go", tools=[wait], timeout=0.05)


@pytest.mark.parametrize("run", [asyncio.run, trio.run], ids=["asyncio", "trio"])
def test_tools_run_on_every_loop(run: Callable[..., Any]) -> None:
    ask, _ = played(asked(("double", '{"x": 4}'), ("half", '{"x": 4}')), "done")

    async def main() -> None:
        assert (await ask("go", tools=[double, half])).text == "done"

    run(main()) if run is asyncio.run else run(main)


class Shop:
    """Bound methods are tools too."""

    async def price(self, item: str) -> Decimal:
        """The price of an item."""
        return Decimal("1.50") if item == "tea" else Decimal(0)


async def test_a_bound_method_is_a_tool_described_by_its_docstring() -> None:
    ask, script = played(asked(("price", '{"item": "tea"}')), "done")
    await ask("go", tools=[Shop().price])
    function = script.bodies[0]["tools"][0]["function"]
    assert function["description"] == "The price of an item."
    assert function["parameters"]["required"] == ["item"]
    assert script.bodies[1]["messages"][-1]["content"] == '"1.50"'


@pytest.mark.parametrize("tool", [lambda x: x, lambda x, /: x, len])
async def test_what_can_be_no_tool_is_a_setup_error(tool: Any) -> None:
    ask, script = played("unused")
    with pytest.raises(SetupError, match="is no tool. Use a function with a plain name"):
        await ask("go", tools=[tool])
    assert script.bodies == []


async def test_streamed_tool_steps_are_one_stream() -> None:
    def events(*deltas: dict[str, Any], finish: str) -> httpx.Response:
        chunks = [{"choices": [{"index": 0, "delta": delta}]} for delta in deltas]
        chunks += [{"choices": [{"index": 0, "delta": {}, "finish_reason": finish}]}]
        chunks += [{"choices": [], "usage": USAGE}]
        text = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks)
        return httpx.Response(200, text=text + "data: [DONE]\n\n")

    call = {"index": 0, "id": "c0", "function": {"name": "double", "arguments": '{"x": 4}'}}
    first = events({"content": "let me see"}, {"tool_calls": [call]}, finish="tool_calls")
    ask, script = played(first, events({"content": " 8"}, finish="stop"), price=(1, 1))
    async with ask.stream("twice 4?", tools=[double]) as stream:
        assert [piece async for piece in stream] == ["let me see", " 8"]
    assert script.bodies[1]["messages"][-1]["content"] == "8"
    assert (stream.reply.text, stream.reply.usage.tokens_in) == (" 8", 20)
    assert stream.reply.cost == pytest.approx(24e-6)


async def test_two_tools_of_one_name_are_a_setup_error() -> None:
    def named(said: str) -> Callable[[], str]:
        def search() -> str:
            return said

        return search

    ask, script = played("unused")
    with pytest.raises(SetupError, match="two have the same name, among search. Rename one"):
        await ask("go", tools=[named("web"), named("files")])
    assert script.bodies == []


async def test_a_plain_tool_that_hangs_ends_with_the_call_too() -> None:
    go = threading.Event()
    ask, _ = played(asked(("wait", "{}")), "unused")

    def wait() -> None:
        go.wait(5)

    with pytest.raises(CallError, match=r"no whole answer within timeout=0\.05 s"):
        await ask("go", tools=[wait], timeout=0.05)
    go.set()


async def test_a_reply_of_a_tool_goes_back_as_its_text_and_a_cancelled_tool_says_so() -> None:
    inner, _ = played("an answer inside")

    async def delegate() -> Any:
        return await inner("hi")

    async def gone() -> None:
        raise asyncio.CancelledError

    ask, script = played(asked(("delegate", "{}"), ("gone", "{}")), "done")
    await ask("go", tools=[delegate, gone])
    said = [m["content"] for m in script.bodies[1]["messages"][-2:]]
    assert said == ["an answer inside", "Error: it was cancelled"]


async def test_an_unknown_kind_of_tool_call_is_passed_on_and_not_bought_again() -> None:
    custom = {"id": "c0", "type": "custom", "custom": {"name": "grep", "input": "x+"}}
    message = {"role": "assistant", "content": None, "tool_calls": [custom]}
    ask, script = played({"choices": [{"message": message, "finish_reason": "tool_calls"}]})
    reply = await ask("go", tools=[{"type": "custom", "custom": {"name": "grep"}}])
    assert reply.tool_calls == (ember.ToolCall("c0", "grep", "x+"),)
    assert reply.message["tool_calls"] == [custom]
    assert len(script.bodies) == 1


async def test_arguments_that_are_streamed_as_an_object_reach_the_tool() -> None:
    call = {"index": 0, "id": "c0", "function": {"name": "double", "arguments": {"x": 4}}}
    choice = {"index": 0, "delta": {"tool_calls": [call]}, "finish_reason": "tool_calls"}
    first = httpx.Response(200, text=f"data: {json.dumps({'choices': [choice]})}\n\n")
    ask, script = played(first, "done")
    async with ask.stream("go", tools=[double]) as stream:
        assert [piece async for piece in stream] == ["done"]
    assert script.bodies[1]["messages"][-1]["content"] == "8"


async def test_a_stream_left_in_its_second_step_has_no_reply_and_does_not_end_silently() -> None:
    pieces = [{"choices": [{"delta": {"content": text}}]} for text in "ab"]
    second = "".join(f"data: {json.dumps(piece)}\n\n" for piece in pieces)
    ask, _ = played(asked(("double", '{"x": 4}')), httpx.Response(200, text=second))
    async with ask.stream("go", tools=[double]) as stream:
        assert await anext(stream) == "a"
    with pytest.raises(CallError, match="closed or broke off before") as caught:
        await anext(stream)
    assert caught.value.partial == "a"
    with pytest.raises(ember.EmberError, match="the stream has not ended"):
        stream.reply  # noqa: B018


# ── Typed output ───


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


@dataclasses.dataclass
class Point:
    x: int
    y: int = 0


class Shape(BaseModel):
    name: str
    points: list[Point]
    colour: Colour | None = None


class Row(TypedDict):
    key: str
    value: int


@pytest.mark.parametrize(
    ("output", "text", "value"),
    [
        (int, '{"value": 7}', 7),
        (int, "7", 7),
        (bool, '{"value": true}', True),
        (float, '{"value": 1}', 1.0),
        (str, '{"value": "{x}"}', "{x}"),
        (list[int], '{"value": [1, 2]}', [1, 2]),
        (tuple[int, str], '{"value": [1, "a"]}', (1, "a")),
        (set[str], '{"value": ["a"]}', {"a"}),
        (dict[str, int], '{"a": 1}', {"a": 1}),
        (Literal["a", "b"], '{"value": "b"}', "b"),
        (int | None, '{"value": null}', None),
        (Colour, '{"value": "blue"}', Colour.BLUE),
        (date, '{"value": "2026-11-21"}', date(2026, 11, 21)),
        (Decimal, '{"value": "1.50"}', Decimal("1.50")),
        (Annotated[int, Field(gt=3)], '{"value": 4}', 4),
        (Point, '{"x": 1}', Point(1)),
        (Row, '{"key": "a", "value": 2}', {"key": "a", "value": 2}),
        (list[Row], '{"value": [{"key": "a", "value": 2}]}', [{"key": "a", "value": 2}]),
        (Shape, '```json\n{"name": "s", "points": [{"x": 1, "y": 2}]}\n```',
         Shape(name="s", points=[Point(1, 2)])),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["openai:gpt-4o", "anthropic:claude-sonnet-5", "deepseek:x"])
async def test_any_type_pydantic_reads_comes_back_as_its_value(
    name: str, output: Any, text: str, value: Any
) -> None:
    answer = anthropic_answer(text) if name.startswith("anthropic") else text
    ask, script = played(answer, name=name)
    reply = await ask("give", output=output)
    assert reply.data == value
    assert type(reply.data) is type(value)
    assert (reply.text, len(script.bodies)) == (text, 1)


async def test_a_wrong_answer_is_asked_for_again_with_the_error_and_all_is_paid_for() -> None:
    ask, script = played("seven", '{"value": "x"}', '{"value": 7}', price=(1, 1))
    reply = await ask("a number", output=int)
    assert (reply.data, reply.usage.tokens_in, reply.usage.tokens_out) == (7, 30, 6)
    assert reply.cost == pytest.approx(36e-6)
    again = script.bodies[2]["messages"]
    assert [m["role"] for m in again] == ["user", "assistant", "user", "assistant", "user"]
    assert "valid integer" in again[-1]["content"]


async def test_after_three_wrong_answers_the_last_one_is_in_the_error() -> None:
    ask, script = played("seven")
    with pytest.raises(ReplyError, match=r"no valid int in 3 answers") as caught:
        await ask("a number", output=int)
    assert caught.value.raw["choices"][0]["message"]["content"] == "seven"
    assert len(script.bodies) == 3


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (openai_answer('{"value": 7', finish="length"), "cut off after .* tokens. Set max_tokens="),
        (openai_answer(None, refusal="I will not."), "refused to answer: I will not."),
        (openai_answer("no", finish="content_filter"), "refused to answer"),
    ],
)
async def test_a_cut_and_a_refusal_are_never_asked_for_again(answer: Any, said: str) -> None:
    ask, script = played(answer)
    with pytest.raises(ReplyError, match=said):
        await ask("a number", output=int)
    assert len(script.bodies) == 1


async def test_typed_output_comes_after_the_tools() -> None:
    ask, script = played(asked(("double", '{"x": 4}')), "eight", '{"value": 8}')
    assert (await ask("twice 4?", tools=[double], output=int)).data == 8
    assert len(script.bodies) == 3


DEEP = "[" * 100_000


async def test_an_answer_nested_too_deep_is_a_typed_error() -> None:
    ask, _ = played(DEEP)
    with pytest.raises(ReplyError, match="in 3 answers"):
        await ask("a list", output=list[str])
    ask, script = played(asked(("double", DEEP)), "done")
    assert (await ask("go", tools=[double])).text == "done"
    assert "the arguments are no JSON object" in script.bodies[1]["messages"][-1]["content"]


@pytest.mark.parametrize("depth", [900, 970, 975, 978, 980, 982, 985, 990, 5000])
async def test_a_body_nested_at_any_depth_is_a_typed_error(depth: int) -> None:
    body = "[" * depth + "]" * depth
    ask, _ = played(httpx.Response(200, text=body), retries=0)
    with pytest.raises(ReplyError):
        await ask("hi")


@pytest.mark.parametrize("message", [{}, {"message": None}])
async def test_a_blocked_answer_without_a_message_is_a_reply(message: dict[str, None]) -> None:
    ask, script = played({"choices": [{"finish_reason": "content_filter", **message}]})
    reply = await ask("hi")
    assert (reply.text, reply.finish, len(script.bodies)) == ("", "content_filter", 1)


async def test_a_whole_answer_to_a_stream_needs_no_finish() -> None:
    ask, script = played({"choices": [{"message": {"content": "all"}, "finish_reason": None}]})
    async with ask.stream("hi") as stream:
        assert [piece async for piece in stream] == ["all"]
    assert len(script.bodies) == 1


async def test_a_type_pydantic_cannot_ask_for_is_a_setup_error() -> None:
    ask, script = played("unused")
    with pytest.raises(SetupError, match="output=<class 'test_calls.Script'> is no type pydantic"):
        await ask("hi", output=Script)
    assert script.bodies == []


# ── Prompts, images, embeddings ───


async def test_a_reply_is_a_prompt_and_the_callers_messages_are_left_alone() -> None:
    ask, script = played("four")
    reply = await ask("2 + 2?")
    messages: list[Any] = [{"role": "user", "content": reply}, reply.message]
    before = [dict(message) for message in messages]
    await ask(reply)
    await ask(messages, system="be brief", images=[PNG], temperature=0)
    assert script.bodies[1]["messages"] == [{"role": "user", "content": "four"}]
    assert messages == before
    assert script.bodies[2]["messages"][0] == {"role": "system", "content": "be brief"}
    assert script.bodies[2]["messages"][1]["content"][0] == {"type": "text", "text": "four"}


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        (None, "the prompt is None"),
        (["hi"], r"a prompt list holds {'role', 'content'} messages, not 'hi'"),
        ([{"content": "hi"}], "a prompt list holds"),
        (b"hi", "the prompt is of type bytes"),
        ({"role": "user", "content": "hi"}, "the prompt is of type dict"),
    ],
)
async def test_a_prompt_that_is_none_is_a_type_error(prompt: Any, said: str) -> None:
    ask, script = played("unused")
    with pytest.raises(TypeError, match=said):
        await ask(prompt)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'prompt'"):
        await ask()  # type: ignore[call-overload]
    assert script.bodies == []


async def test_what_belongs_to_the_model_is_not_a_parameter_of_a_call() -> None:
    ask, script = played("unused")
    for name in ("api_key", "base_url", "retries", "transport"):
        with pytest.raises(SetupError, match=rf"{name}= is a field of the model: use \.using\("):
            await ask("hi", **{name: "sk-other-12345678"})
    with pytest.raises(SetupError, match="stream= is no parameter"):
        await ask.using(stream=True)("hi")
    assert script.bodies == []


async def test_text_in_a_prompt_is_never_a_template() -> None:
    ask, script = played("ok")
    text = "{x} {0.__class__} %s $y {{ z }}"
    await ask(text, system=text)
    assert [m["content"] for m in script.bodies[0]["messages"]] == [text, text]


@pytest.mark.parametrize(
    ("content", "kind"),
    [(PNG, "png"), (b"\xff\xd8\xff\xe0", "jpeg"), (b"GIF89a", "gif"), (b"RIFF....WEBPVP8", "webp")],
)
async def test_images_are_bytes_paths_and_urls(tmp_path: Path, content: bytes, kind: str) -> None:
    path = tmp_path / "image"
    path.write_bytes(content)
    ask, script = played("a picture")
    await ask("what?", images=[content, path, str(path), "https://example.com/a.png"])
    text, *images = script.bodies[0]["messages"][0]["content"]
    urls = [part["image_url"]["url"] for part in images]
    assert text == {"type": "text", "text": "what?"}
    assert urls[0] == urls[1] == urls[2]
    assert urls[0].startswith(f"data:image/{kind};base64,")
    assert urls[3] == "https://example.com/a.png"


async def test_an_image_that_is_none_says_so() -> None:
    ask, script = played("unused")
    with pytest.raises(SetupError, match="images: b'RIFF....WAVE' is no PNG, JPEG, GIF or WebP"):
        await ask("what?", images=[b"RIFF....WAVE"])
    with pytest.raises(SetupError, match="images= needs a message of the user"):
        await ask([{"role": "system", "content": "x"}], images=[PNG])
    with pytest.raises(FileNotFoundError):
        await ask("what?", images=["no such file.png"])
    assert script.bodies == []


def vectors(request: httpx.Request) -> httpx.Response:
    """One number for each text, last first."""
    texts = json.loads(request.content)["input"]
    rows = [{"index": n, "embedding": [float(t)]} for n, t in enumerate(texts)]
    return httpx.Response(200, json={"data": rows[::-1], "usage": {"prompt_tokens": len(texts)}})


async def test_embeddings_come_in_order_in_as_few_requests_as_allowed() -> None:
    sizes = list[int]()

    def count(request: httpx.Request) -> httpx.Response:
        sizes.append(len(json.loads(request.content)["input"]))
        return vectors(request)

    ask, _ = played("unused", name="openai:text-embedding-3-small")
    ask = ask.using(transport=httpx.MockTransport(count))
    texts = [str(n) for n in range(5000)]
    assert await ask.embed(texts) == [[float(text)] for text in texts]
    assert sizes == [2048, 2048, 904]
    assert await ask.embed([]) == []
    assert await ask.embed(str(n) for n in range(3)) == [[0.0], [1.0], [2.0]]  # type: ignore[arg-type]


async def test_embeddings_of_long_texts_are_split_by_size_too() -> None:
    ask, script = played("unused", name="openai:text-embedding-3-small")
    sizes = list[int]()

    def count(request: httpx.Request) -> httpx.Response:
        texts = json.loads(request.content)["input"]
        sizes.append(len(texts))
        return httpx.Response(200, json={"data": [{"embedding": [1.0]} for _ in texts]})

    await ask.using(transport=httpx.MockTransport(count)).embed(["x" * 100_000] * 13)
    assert sizes == [6, 6, 1]
    assert script.bodies == []


async def test_wrong_embeddings_are_errors_that_say_so() -> None:
    ask, _ = played({"data": [{"embedding": [1.0]}]}, name="openai:text-embedding-3-small")
    with pytest.raises(ReplyError, match="answered 2 texts with"):
        await ask.embed(["a", "b"])
    with pytest.raises(TypeError, match=r"embed\(\) takes a list of texts, not 'text'"):
        await ask.embed("text")
    claude, _ = played("unused", name="anthropic:claude-sonnet-5")
    with pytest.raises(SetupError, match="this provider has no embeddings; use models.embedding"):
        await claude.embed(["a"])


# ── Waits ───


async def test_a_retry_waits_as_long_as_the_server_asks_and_a_random_time_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waits, bounds = list[float](), list[tuple[float, float]]()

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    def uniform(low: float, high: float) -> float:
        bounds.append((low, high))
        return 0.25

    monkeypatch.setattr(anyio, "sleep", sleep)
    monkeypatch.setattr("random.uniform", uniform)
    asks = [httpx.Response(429, headers={"retry-after": "2"}), httpx.Response(503)]
    ask, _ = played(*asks, httpx.Response(503), httpx.Response(503), "done", retries=9)
    assert (await ask("hi")).text == "done"
    assert waits == [2.25, 0.25, 0.25, 0.25]
    assert bounds == [(0, 0.5), (0, 1), (0, 2), (0, 4)]


async def test_a_stream_stalls_before_its_headers_with_a_transport_of_ones_own_too() -> None:
    async def hang(_: httpx.Request) -> httpx.Response:
        await anyio.sleep_forever()
        raise AssertionError

    ask, _ = played("unused", stall=0.03, retries=2)
    with pytest.raises(CallError, match=r"no byte for stall=0\.03 s"):
        await anext(ask.using(transport=httpx.MockTransport(hang)).stream("hi"))


# ── What the calls report ───


async def test_each_attempt_is_reported_once_failures_and_cancellation_too() -> None:
    with ember.track() as ledger:
        busy = httpx.Response(503, headers={"retry-after-ms": "1"})
        ask, _ = played(busy, "seven", '{"value": 7}')
        await ask("a number", output=int)
        hanging = ask.using(transport=httpx.MockTransport(lambda _: anyio.sleep_forever()))  # type: ignore[arg-type]
        with anyio.move_on_after(0.01):
            await hanging("hi")
    outcomes = [attempt.outcome.partition(":")[0] for attempt in ledger.calls]
    assert outcomes == ["CallError", "ok", "ok", "cancelled"]
    assert all(attempt.model == "gpt-4o" and attempt.seconds >= 0 for attempt in ledger.calls)


async def test_a_stream_reports_to_those_who_listened_when_it_was_made() -> None:
    ask, _ = played("whole")
    with ember.track() as ledger:
        stream = ask.stream("hi")
    assert [piece async for piece in stream] == ["whole"]
    assert ledger.requests == 1
