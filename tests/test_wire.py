"""Both wires read: what `decode` makes of an answer, `decode_event` of a stream, and its cost."""

import dataclasses
import json
from collections.abc import Iterable
from typing import Any

import httpx
import pytest
from official import chat_problems

import ember
from ember import Price, ToolCall, Usage

OPENAI, ANTHROPIC = ember.providers["openai"], ember.providers["anthropic"]


def completion(message: Any, finish: str | None = "stop", usage: Any = None, **more: Any) -> Any:
    """A chat completion with this message."""
    message = {"role": "assistant", **message}
    choice = {"index": 0, "message": message, "finish_reason": finish, "logprobs": None}
    return {"id": "c1", "model": "m-1", "choices": [choice], "usage": usage, **more}


def chunk(delta: Any = None, finish: str | None = None, **more: Any) -> Any:
    """One event of a streamed chat completion."""
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return {
        "id": "c1",
        "object": "chat.completion.chunk",
        "model": "m-1",
        "choices": [choice],
        **more,
    }


def message(*blocks: Any, stop: str | None = "end_turn", usage: Any = None) -> Any:
    """An Anthropic message with these blocks."""
    usage = {"input_tokens": 3, "output_tokens": 2} if usage is None else usage
    said = {"id": "msg_1", "type": "message", "role": "assistant", "model": "m-1", "usage": usage}
    return {**said, "content": list(blocks), "stop_reason": stop, "stop_sequence": None}


def block_events(index: int, block: Any, *deltas: Any) -> list[Any]:
    """The events that deliver one block of an Anthropic message."""
    start = {"type": "content_block_start", "index": index, "content_block": block}
    pieces = [{"type": "content_block_delta", "index": index, "delta": delta} for delta in deltas]
    return [start, *pieces, {"type": "content_block_stop", "index": index}]


def message_events(
    *blocks: list[Any], stop: str | None = "end_turn", start: Any = None, end: Any = None
) -> list[Any]:
    """The events of an Anthropic message."""
    opening = message(stop=None, usage=start or {"input_tokens": 3, "output_tokens": 1})
    ending = {"type": "message_delta", "delta": {"stop_reason": stop, "stop_sequence": None}}
    return [
        {"type": "message_start", "message": opening},
        {"type": "ping"},
        *(event for block in blocks for event in block),
        {**ending, "usage": end or {"output_tokens": 2}},
        {"type": "message_stop"},
    ]


def asked(name: str, arguments: Any = "{}", id: str | None = "a1", **more: Any) -> Any:
    """A tool call in OpenAI's form."""
    function = {"name": name, "arguments": arguments}
    return {"id": id, "type": "function", "function": function, **more}


def fold(row: ember.Provider, events: Iterable[Any]) -> tuple[ember.Reply[str], list[str]]:
    """The reply that a stream ends as, and the pieces of text it delivered."""
    body: dict[str, Any] = {}
    pieces = [row.decode_event(body, json.loads(json.dumps(event))) for event in events]
    return row.decode(body), [piece for piece in pieces if piece]


# ── Replies ───


def test_a_chat_completion_is_read_field_by_field() -> None:
    """Every field of the reply, as the wire states it."""
    usage = {"prompt_tokens": 9, "completion_tokens": 4, "total_tokens": 13}
    raw = completion({"content": "Seine, Rhine"}, usage=usage)
    assert dataclasses.asdict(OPENAI.decode(raw)) == {
        "text": "Seine, Rhine",
        "data": "Seine, Rhine",
        "usage": dataclasses.asdict(Usage(9, 4)),
        "cost": None,
        "model": "m-1",
        "finish": "stop",
        "tool_calls": (),
        "seconds": 0.0,
        "cached": False,
        "raw": raw,
        "message": {"role": "assistant", "content": "Seine, Rhine"},
    }


def test_an_anthropic_message_is_read_field_by_field() -> None:
    """Every field of the reply, as the wire states it."""
    text = {"type": "text", "text": "Seine, Rhine"}
    raw = message(text)
    assert dataclasses.asdict(ANTHROPIC.decode(raw)) == {
        "text": "Seine, Rhine",
        "data": "Seine, Rhine",
        "usage": dataclasses.asdict(Usage(3, 2)),
        "cost": None,
        "model": "m-1",
        "finish": "end_turn",
        "tool_calls": (),
        "seconds": 0.0,
        "cached": False,
        "raw": raw,
        "message": {"role": "assistant", "content": [text]},
    }


@pytest.mark.parametrize(
    ("row", "raw", "text", "finish"),
    [
        (OPENAI, completion({"content": None, "refusal": "I can't."}), "", "stop"),
        (OPENAI, completion({"content": None}, "content_filter"), "", "content_filter"),
        (OPENAI, completion({}, "stop"), "", "stop"),
        (OPENAI, completion({"content": "Sei"}, "length"), "Sei", "length"),
        (OPENAI, completion({"content": "Seine"}, None), "Seine", None),
        (ANTHROPIC, message(stop="refusal"), "", "refusal"),
        (
            ANTHROPIC,
            message({"type": "text", "text": "Sei"}, stop="max_tokens"),
            "Sei",
            "max_tokens",
        ),
        (
            ANTHROPIC,
            message({"type": "text", "text": "a"}, {"type": "text", "text": "b"}),
            "ab",
            "end_turn",
        ),
    ],
)
def test_an_answer_without_its_text_is_still_a_reply(
    row: ember.Provider, raw: Any, text: str, finish: str | None
) -> None:
    """Refusals, filters, truncations: paid for, and told by `finish`."""
    reply = row.decode(raw)
    assert (reply.text, reply.data, str(reply), reply.finish) == (text, text, text, finish)


def test_no_choices_is_an_error_that_keeps_the_answer() -> None:
    """A blocked prompt is no reply."""
    raw = {"id": "c1", "choices": [], "usage": None}
    with pytest.raises(ember.ReplyError, match="choices") as caught:
        OPENAI.decode(raw)
    assert caught.value.raw == raw
    assert not caught.value.transient


MISTRAL_PARTS = [
    {"type": "thinking", "thinking": [{"type": "text", "text": "The user wants…"}]},
    {"type": "text", "text": "Look left, "},
    {"type": "text", "text": "then right."},
]


@pytest.mark.parametrize(
    ("row", "raw"),
    [
        (OPENAI, completion({"content": MISTRAL_PARTS})),
        (OPENAI, completion({"content": "Look left, then right.", "reasoning_content": "Hm"})),
        (OPENAI, completion({"content": "Look left, then right.", "reasoning": "Hm"})),
        (
            ANTHROPIC,
            message(
                {"type": "thinking", "thinking": "Hm", "signature": "c2ln"},
                {"type": "redacted_thinking", "data": "ZGF0YQ=="},
                {"type": "text", "text": "Look left, then right."},
            ),
        ),
    ],
    ids=["list", "reasoning_content", "reasoning", "blocks"],
)
def test_thinking_is_never_taken_for_text(row: ember.Provider, raw: Any) -> None:
    """However a provider delivers it."""
    assert row.decode(raw).text == "Look left, then right."


# ── Tool calls ───


def test_parallel_tool_calls_keep_order_and_identity() -> None:
    """Arguments are parsed; the turn can be sent back as it is."""
    calls = [asked("add", '{"a": 1, "b": 2}', "c1"), asked("add", '{"a": 3, "b": 4}', "c2")]
    reply = OPENAI.decode(completion({"content": None, "tool_calls": calls}, "tool_calls"))
    assert reply.tool_calls == (
        ToolCall("c1", "add", {"a": 1, "b": 2}),
        ToolCall("c2", "add", {"a": 3, "b": 4}),
    )
    assert reply.message == {"role": "assistant", "content": "", "tool_calls": calls}
    assert reply.text == ""


def test_anthropic_tool_uses_stand_beside_text() -> None:
    """The turn is sent back as it came."""
    direct = {"caller": {"type": "direct"}}
    blocks = [
        {"type": "text", "text": "Adding.", "citations": None},
        {"type": "tool_use", "id": "t1", "name": "add", "input": {"a": 1}, **direct},
        {"type": "tool_use", "id": "t2", "name": "add", "input": {"a": 2}, **direct},
    ]
    reply = ANTHROPIC.decode(message(*blocks, stop="tool_use"))
    assert reply.text == "Adding."
    assert reply.tool_calls == (ToolCall("t1", "add", {"a": 1}), ToolCall("t2", "add", {"a": 2}))
    assert reply.message == {"role": "assistant", "content": blocks}


@pytest.mark.parametrize(
    ("arguments", "read"),
    [
        ("", {}),
        (None, {}),
        ("{}", {}),
        ({"a": 1}, {"a": 1}),
        ('{"a": ', '{"a": '),
        ("[1, 2]", "[1, 2]"),
        ("7", "7"),
    ],
)
def test_tool_arguments_are_an_object_or_the_text_that_is_none(arguments: Any, read: Any) -> None:
    """Some servers send objects, some send nothing; what cannot be read is kept."""
    call = asked("f", arguments)
    (read_call,) = OPENAI.decode(completion({"tool_calls": [call]}, "tool_calls")).tool_calls
    assert read_call == ToolCall("a1", "f", read)


@pytest.mark.parametrize(
    "call",
    [
        asked("f"),
        asked("f", ""),
        asked("f", None),
        asked("f", {"a": 1}),
        asked("f", '{"a": '),
        asked("f", id=None),
        asked("f", index=0),
        asked("f", type=None),
    ],
    ids=["plain", "empty", "null", "object", "cut", "no id", "index", "no type"],
)
def test_a_turn_with_a_tool_call_is_valid_when_it_is_sent_back(call: Any) -> None:
    """By OpenAI's schema, however odd the call was."""
    said = {
        "content": None,
        "refusal": None,
        "annotations": [],
        "audio": None,
        "tool_calls": [call],
    }
    reply = OPENAI.decode(completion(said, "tool_calls"))
    result = {"role": "tool", "tool_call_id": reply.tool_calls[0].id, "content": "done"}
    turns = [{"role": "user", "content": "a question"}, reply.message, result]
    assert chat_problems({"model": "m", "messages": turns}) == []


@pytest.mark.parametrize("id", ["", None])
def test_tool_calls_without_ids_get_distinct_ones(id: Any) -> None:
    """The same in the reply and in the turn that is sent back (Gemini)."""
    calls = [{**asked("f"), "id": id}, {**asked("g"), "id": id}]
    reply = OPENAI.decode(completion({"tool_calls": calls}, "stop"))
    ids = [call.id for call in reply.tool_calls]
    assert len(set(ids)) == 2
    assert all(ids)
    assert [call["id"] for call in reply.message["tool_calls"]] == ids


def test_a_tool_call_without_a_type_is_sent_back_with_one() -> None:
    """Mistral leaves the type out of its answers."""
    call = asked("f")
    del call["type"]
    reply = OPENAI.decode(completion({"content": "", "tool_calls": [{**call, "index": 0}]}))
    assert reply.message["tool_calls"] == [asked("f")]


def test_what_a_tool_loop_must_send_back_is_in_the_turn() -> None:
    """Gemini's signatures, DeepSeek's reasoning: without them the next request is refused."""
    signed = {"google": {"thought_signature": "c2ln"}}
    said = {
        "content": "",
        "reasoning_content": "Hm",
        "tool_calls": [asked("f", extra_content=signed)],
    }
    turn = OPENAI.decode(completion(said, "tool_calls")).message
    assert turn["reasoning_content"] == "Hm"
    assert turn["tool_calls"][0]["extra_content"] == signed


def test_anthropic_thinking_is_in_the_turn_unchanged() -> None:
    """With its signature: a changed block is refused."""
    blocks = [
        {"type": "thinking", "thinking": "Hm", "signature": "c2ln"},
        {"type": "redacted_thinking", "data": "ZGF0YQ=="},
        {"type": "server_tool_use", "id": "s1", "name": "web_search", "input": {"query": "x"}},
        {"type": "tool_use", "id": "t1", "name": "f", "input": {}},
    ]
    assert ANTHROPIC.decode(message(*blocks, stop="tool_use")).message["content"] == blocks


# ── Usage ─── one meaning for all


@pytest.mark.parametrize(
    ("row", "counts", "usage"),
    [
        ("openai", {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}, Usage(10, 5)),
        (
            "openai",
            {
                "prompt_tokens": 100,
                "completion_tokens": 50,
                "total_tokens": 150,
                "prompt_tokens_details": {"cached_tokens": 60, "cache_write_tokens": 20},
                "completion_tokens_details": {"reasoning_tokens": 30},
            },
            Usage(100, 50, 60, 30, 20),
        ),
        (
            "deepseek",
            {"prompt_tokens": 9, "completion_tokens": 1, "prompt_cache_hit_tokens": 4},
            Usage(9, 1, 4),
        ),
        (
            "mistral",
            {"prompt_tokens": 9, "completion_tokens": 1, "num_cached_tokens": 4},
            Usage(9, 1, 4),
        ),
        (
            "together",
            {"prompt_tokens": 9, "completion_tokens": 1, "cached_tokens": 4},
            Usage(9, 1, 4),
        ),
        (  # xAI leaves reasoning out of completion_tokens
            "xai",
            {
                "prompt_tokens": 32,
                "completion_tokens": 9,
                "total_tokens": 135,
                "completion_tokens_details": {"reasoning_tokens": 94},
            },
            Usage(32, 103, 0, 94),
        ),
        (  # and Gemini does not even say how much it was
            "gemini",
            {"prompt_tokens": 20, "completion_tokens": 424, "total_tokens": 1016},
            Usage(20, 996, 0, 572),
        ),
        ("anthropic", {"input_tokens": 10, "output_tokens": 5}, Usage(10, 5)),
        (
            "anthropic",
            {
                "input_tokens": 6,
                "cache_read_input_tokens": 1000,
                "cache_creation_input_tokens": 300,
                "cache_creation": {
                    "ephemeral_5m_input_tokens": 100,
                    "ephemeral_1h_input_tokens": 200,
                },
                "output_tokens": 50,
                "output_tokens_details": {"thinking_tokens": 40},
            },
            Usage(1306, 50, 1000, 40, 100, 200),
        ),
        (
            "anthropic",
            {"input_tokens": 6, "cache_creation_input_tokens": 300, "output_tokens": 5},
            Usage(306, 5, 0, 0, 300),
        ),
    ],
)
def test_usage_has_one_meaning_for_every_provider(row: str, counts: Any, usage: Usage) -> None:
    """All input, all output, and what of it was cached, written, reasoned."""
    raw = (
        message(usage=counts) if row == "anthropic" else completion({"content": "a"}, usage=counts)
    )
    assert ember.providers[row].decode(raw).usage == usage


@pytest.mark.parametrize("row", [OPENAI, ANTHROPIC], ids=["openai", "anthropic"])
@pytest.mark.parametrize(
    "counts",
    [
        None,
        {},
        [],
        "many",
        {
            "prompt_tokens": None,
            "input_tokens": None,
            "completion_tokens": None,
            "output_tokens": "2",
        },
        {"prompt_tokens_details": None, "completion_tokens_details": None, "cache_creation": None},
        {"prompt_tokens_details": [], "completion_tokens_details": 7, "cache_creation": "x"},
    ],
)
def test_odd_usage_does_not_cost_the_answer(row: ember.Provider, counts: Any) -> None:
    """It was paid for."""
    text = {"type": "text", "text": "a"}
    raw = completion({"content": "a"}) if row is OPENAI else message(text)
    reply = row.decode({**raw, "usage": counts})
    assert (reply.text, reply.usage) == ("a", Usage())


def test_usage_adds_up() -> None:
    """Field by field."""
    total = Usage(1, 2, 3, 4, 5, 6) + Usage(10, 20, 30, 40, 50, 60)
    assert total == Usage(11, 22, 33, 44, 55, 66)


# ── Cost ───

SONNET = Price(3, 15, cached=0.3, written=3.75)
LONG = Price(1.25, 10, cached=0.125, long=(200_000, 2.5, 15, 0.25))


@pytest.mark.parametrize(
    ("price", "usage", "dollars"),
    [
        (Price(2.5, 10, 1.25), Usage(1_000_000, 100_000), 3.5),
        (Price(2.5, 10, 1.25), Usage(1_000_000, 0, tokens_cached=400_000), 2.0),
        (Price(2.5, 10), Usage(1_000_000, 0, tokens_cached=400_000), 2.5),
        (Price(2, 8), Usage(0, 1_000_000, tokens_reasoning=900_000), 8.0),
        (Price(4, 20, 0.4, 5), Usage(1_000_000, 0, 500_000, 0, 100_000), 2.3),
        (SONNET, Usage(1_000_000, 0, 600_000, 0, 100_000, 100_000), 0.6 + 0.18 + 0.375 + 0.6),
        (LONG, Usage(200_000, 1_000_000), 10.25),
        (LONG, Usage(200_001, 1_000_000), 15.5000025),
        (LONG, Usage(400_000, 0, tokens_cached=200_000), 0.55),
        (Price(0.02), Usage(1_000_000, 0), 0.02),
        (Price(0, 0), Usage(1_000_000, 1_000_000), 0.0),
    ],
)
def test_each_kind_of_token_costs_what_it_is_billed(
    price: Price, usage: Usage, dollars: float
) -> None:
    """US dollars per million."""
    assert price.cost(usage) == pytest.approx(dollars)


@pytest.mark.parametrize(("price", "cost"), [(Price(1, 2), None), (Price(0, 0), 0.0)])
def test_unknown_usage_is_free_only_where_everything_is(price: Price, cost: float | None) -> None:
    """Never 0 for not known."""
    assert price.cost(Usage()) == cost


def answering(raw: Any) -> httpx.MockTransport:
    """A transport that always gives this answer."""
    return httpx.MockTransport(lambda request: httpx.Response(200, json=raw))


MANY = {"prompt_tokens": 1_000_000, "completion_tokens": 500_000, "total_tokens": 1_500_000}
HIDDEN = {"prompt_tokens": 100_000, "completion_tokens": 50_000, "total_tokens": 300_000}
HOURS = {"ephemeral_5m_input_tokens": 1_000_000, "ephemeral_1h_input_tokens": 1_000_000}
WRITTEN = {"input_tokens": 0, "cache_creation_input_tokens": 2_000_000, "cache_creation": HOURS}
MANY_IN = {"input_tokens": 100_000, "cache_read_input_tokens": 900_000, "output_tokens": 500_000}


@pytest.mark.parametrize(
    ("spec", "raw", "price", "cost"),
    [
        ("openai:gpt-4o", completion({"content": "a"}, usage=MANY), None, 7.5),
        ("openai:gpt-4o", completion({"content": "a"}, usage=MANY), (1, 2), 2.0),
        ("openai:gpt-4o", completion({"content": "a"}), None, None),
        ("openai:my-own-model", completion({"content": "a"}, usage=MANY), None, None),
        ("openai:my-own-model", completion({"content": "a"}, usage=MANY), (0, 0), 0.0),
        ("openai:my-own-model", completion({"content": "a"}), (0, 0), 0.0),
        ("openrouter:a/b", completion({"content": "a"}, usage={**MANY, "cost": 0.25}), None, 0.25),
        ("openrouter:a/b", completion({"content": "a"}, usage={**MANY, "cost": 0}), None, 0.0),
        ("openrouter:a/b", completion({"content": "a"}, usage=MANY), None, None),
        (
            "openai:my-own-model",
            completion({"content": "a"}, usage={**MANY, "cost": {"usd": 1}}),
            None,
            None,
        ),
        (
            "openai:my-own-model",
            completion({"content": "a"}, usage={**MANY, "cost": "0.1"}),
            None,
            None,
        ),
        ("anthropic:claude-sonnet-4-5", message(usage=MANY_IN), None, 0.3 + 0.27 + 7.5),
        ("anthropic:claude-sonnet-4-5-20250929", message(usage=WRITTEN), None, 3.75 + 6.0),
        ("gemini:gemini-2.5-pro", completion({"content": "a"}, usage=MANY), None, 2.5 + 7.5),
        ("gemini:gemini-2.5-pro", completion({"content": "a"}, usage=HIDDEN), None, 0.125 + 2.0),
        ("xai:grok-4.3", completion({"content": "a"}, usage=HIDDEN), None, 0.125 + 0.5),
    ],
)
async def test_a_call_costs_what_its_price_says(
    spec: str, raw: Any, price: Any, cost: float | None
) -> None:
    """The dated table, `price=`, or what the provider states; None where nobody knows."""
    given = {} if price is None else {"price": price}
    called = ember.model(spec, api_key="k", transport=answering(raw), **given)
    reply = await called("a question")
    assert reply.cost == (cost if cost is None else pytest.approx(cost))


async def test_all_answers_of_a_call_are_in_its_usage_and_cost() -> None:
    """A wrong one too: it was paid for. One of unknown cost makes the sum unknown."""
    wrong, right = ({"content": text} for text in ('{"value": "x"}', '{"value": 7}'))
    for counts, cost in ((MANY, 4.0), (None, None)):
        answers = [completion(wrong, usage=counts), completion(right, usage=MANY)]
        transport = httpx.MockTransport(lambda _, a=answers: httpx.Response(200, json=a.pop(0)))
        called = ember.model("openai:m", api_key="k", price=(1, 2), transport=transport)
        reply = await called("a question", output=int)
        assert (reply.data, reply.cost) == (7, cost)
        assert reply.usage.tokens_in == (2_000_000 if counts else 1_000_000)


# ── Streams ─── what they fold into is what the same call without streaming gets

TEXT = {"type": "text", "text": ""}
USED = {"type": "tool_use", "id": "t1", "name": "add", "input": {}}
COUNTS = {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}


def deltas(*deltas: Any, finish: str = "stop", **last: Any) -> list[Any]:
    """The events that deliver these deltas, the last of them with the finish reason."""
    return [*map(chunk, deltas[:-1]), chunk(deltas[-1], finish, **last)]


def part(index: int | None, arguments: Any, name: str | None = None, id: str | None = None) -> Any:
    """The delta of one fragment of a tool call."""
    said = {"name": name, "arguments": arguments}
    fragment = {
        "index": index,
        "id": id,
        "function": {k: v for k, v in said.items() if v is not None},
    }
    return {"tool_calls": [{k: v for k, v in fragment.items() if v is not None}]}


def called(*calls: Any, finish: str = "tool_calls") -> Any:
    """A chat completion with these tool calls."""
    return completion({"content": None, "tool_calls": list(calls)}, finish)


ONE, OTHER = asked("add", '{"a": 1}', "c1"), asked("sub", '{"b": 2}', "c2")
SIGNED = {"extra_content": {"google": {"thought_signature": "c2ln"}}}
SEINE = completion({"content": "Seine"})
COUNTED = completion({"content": "Seine"}, usage=COUNTS)
NULLS = {"role": None, "content": None, "tool_calls": None, "refusal": None}
OPENAI_STREAMS = {
    "plain": (
        deltas({"role": "assistant", "content": ""}, {"content": "Sei"}, {"content": "ne"}, {}),
        SEINE,
    ),
    "nulls": (deltas(NULLS, None, {"content": "Seine"}, None), SEINE),
    "usage beside no choices": (
        [*deltas({"content": "Seine"}, {}, usage=None), {"choices": [], "usage": COUNTS}],
        COUNTED,
    ),
    "usage beside an empty choice": (
        [*deltas({"content": "Seine"}), {"choices": [{"delta": {}}], "usage": COUNTS}],
        COUNTED,
    ),
    "usage without choices": ([*deltas({"content": "Seine"}), {"usage": COUNTS}], COUNTED),
    "usage in every chunk, the last is right": (
        [
            chunk({"content": "Sei"}, usage={**COUNTS, "prompt_tokens": 6}),
            chunk({"content": "ne"}, "stop", usage=COUNTS),
        ],
        COUNTED,
    ),
    "usage in Groq's own place": (
        deltas({"content": "Seine"}, {}, x_groq={"usage": COUNTS}),
        COUNTED,
    ),
    "finish reason twice": (
        [*deltas({"content": "Seine"}), *deltas({"content": ""}, usage=COUNTS)],
        COUNTED,
    ),
    "the filter's results first": (
        [
            {"choices": [], "prompt_filter_results": []},
            *deltas({"content": "Seine"}, finish="content_filter"),
        ],
        completion({"content": "Seine"}, "content_filter"),
    ),
    "refusal": (
        deltas({"content": None, "refusal": ""}, {"refusal": "I "}, {"refusal": "can't."}, {}),
        completion({"content": None, "refusal": "I can't."}),
    ),
    "reasoning": (
        deltas({"reasoning_content": "H"}, {"reasoning_content": "m"}, {"content": "Seine"}),
        completion({"content": "Seine", "reasoning_content": "Hm"}),
    ),
    "reasoning in details": (
        deltas(
            {"reasoning_details": [{"text": "H"}]},
            {"reasoning_details": [{"text": "m"}]},
            {"content": "Seine"},
        ),
        completion({"content": "Seine", "reasoning_details": [{"text": "H"}, {"text": "m"}]}),
    ),
    "list content": (
        deltas({"content": MISTRAL_PARTS[:1]}, {"content": MISTRAL_PARTS[1:]}, {"content": " Go."}),
        completion({"content": [*MISTRAL_PARTS, {"type": "text", "text": " Go."}]}),
    ),
    "another answer between": (
        [
            chunk({"content": "Sei"}),
            {"choices": [{"index": 1, "delta": {"content": "Rhine"}, "finish_reason": "stop"}]},
            chunk({"content": "ne"}, "stop"),
        ],
        SEINE,
    ),
    "tool calls in fragments": (
        deltas(
            *(part(0, "", "add", "c1"), part(0, '{"a"'), part(0, ": 1}")),
            *(part(1, "", "sub", "c2"), part(1, '{"b": 2}'), {}),
            finish="tool_calls",
        ),
        called(ONE, OTHER),
    ),
    "fragments in turn": (
        deltas(
            *(
                part(0, "", "add", "c1"),
                part(1, "", "sub", "c2"),
                part(0, '{"a"'),
                part(1, '{"b": '),
            ),
            *(part(0, ": 1}"), part(1, "2}")),
            finish="tool_calls",
        ),
        called(ONE, OTHER),
    ),
    "id and name in every fragment": (
        deltas(
            *(part(0, '{"a"', "add", "c1"), part(0, ": 1}", "add", "c1")),
            part(1, '{"b": 2}', "sub", "c2"),
            finish="tool_calls",
        ),
        called(ONE, OTHER),
    ),
    "whole calls without index": (
        deltas(
            part(None, '{"a": 1}', "add", "c1"),
            part(None, '{"b": 2}', "sub", "c2"),
            finish="tool_calls",
        ),
        called(ONE, OTHER),
    ),
    "whole calls without index in one chunk": (
        deltas({"tool_calls": [ONE, OTHER]}, finish="tool_calls"),
        called(ONE, OTHER),
    ),
    "index always 0": (
        deltas(
            part(0, '{"a": 1}', "add", "c1"), part(0, '{"b": 2}', "sub", "c2"), finish="tool_calls"
        ),
        called(ONE, OTHER),
    ),
    "whole calls without index or id": (
        deltas(part(None, '{"a": 1}', "add", ""), part(None, '{"b": 2}', "sub", "")),
        called({**ONE, "id": ""}, {**OTHER, "id": ""}, finish="stop"),
    ),
    "arguments are null, then nothing": (
        deltas({"tool_calls": [asked("now", None, "c1", index=0)]}, {}, finish="tool_calls"),
        called(asked("now", "", "c1")),
    ),
    "signed calls": (
        deltas({"tool_calls": [asked("f", "{}", "", **SIGNED)]}),
        called(asked("f", "{}", "", **SIGNED), finish="stop"),
    ),
    "arguments cut short": (
        deltas(part(0, '{"a": ', "add", "c1"), {}, finish="length"),
        called(asked("add", '{"a": ', "c1"), finish="length"),
    ),
}


def text_deltas(*texts: str) -> list[Any]:
    """Pieces of a text block."""
    return [{"type": "text_delta", "text": text} for text in texts]


def json_deltas(text: str, size: int = 1) -> list[Any]:
    """A tool's input, cut into pieces."""
    cut = [text[at : at + size] for at in range(0, len(text), size)]
    return [{"type": "input_json_delta", "partial_json": part} for part in ["", *cut]]


ANTHROPIC_STREAMS = {
    "plain": (
        message_events(block_events(0, TEXT, *text_deltas("Sei", "ne"))),
        message({"type": "text", "text": "Seine"}),
    ),
    "two texts": (
        message_events(
            block_events(0, TEXT, *text_deltas("Sei")), block_events(1, TEXT, *text_deltas("ne"))
        ),
        message({"type": "text", "text": "Sei"}, {"type": "text", "text": "ne"}),
    ),
    "thinking": (
        message_events(
            block_events(
                0,
                {"type": "thinking", "thinking": "", "signature": ""},
                {"type": "thinking_delta", "thinking": "H"},
                {"type": "thinking_delta", "thinking": "m"},
                {"type": "signature_delta", "signature": "c2ln"},
            ),
            block_events(1, {"type": "redacted_thinking", "data": "ZGF0YQ=="}),
            block_events(2, TEXT, *text_deltas("Seine")),
        ),
        message(
            {"type": "thinking", "thinking": "Hm", "signature": "c2ln"},
            {"type": "redacted_thinking", "data": "ZGF0YQ=="},
            {"type": "text", "text": "Seine"},
        ),
    ),
    "tool uses": (
        message_events(
            block_events(0, TEXT, *text_deltas("Adding.")),
            block_events(1, USED, *json_deltas('{"a": "ü\\u00e9", "b": [1, 2]}')),
            block_events(2, {**USED, "id": "t2", "name": "now"}),
            stop="tool_use",
        ),
        message(
            {"type": "text", "text": "Adding."},
            {**USED, "input": {"a": "üé", "b": [1, 2]}},
            {**USED, "id": "t2", "name": "now"},
            stop="tool_use",
        ),
    ),
    "a tool of the server's": (
        message_events(
            block_events(0, {**USED, "type": "server_tool_use"}, *json_deltas('{"query": "x"}', 4)),
            block_events(1, {"type": "web_search_tool_result", "tool_use_id": "t1", "content": []}),
            block_events(2, TEXT, *text_deltas("Seine")),
        ),
        message(
            {**USED, "type": "server_tool_use", "input": {"query": "x"}},
            {"type": "web_search_tool_result", "tool_use_id": "t1", "content": []},
            {"type": "text", "text": "Seine"},
        ),
    ),
    "cumulative usage": (
        message_events(
            block_events(0, TEXT, *text_deltas("Seine")),
            start={
                "input_tokens": 702,
                "output_tokens": 1,
                "cache_creation_input_tokens": 30,
                "cache_creation": {
                    "ephemeral_5m_input_tokens": 10,
                    "ephemeral_1h_input_tokens": 20,
                },
            },
            end={"input_tokens": 1591, "cache_read_input_tokens": 8, "output_tokens": 175},
        ),
        message(
            {"type": "text", "text": "Seine"},
            usage={
                "input_tokens": 1591,
                "output_tokens": 175,
                "cache_creation_input_tokens": 30,
                "cache_creation": {
                    "ephemeral_5m_input_tokens": 10,
                    "ephemeral_1h_input_tokens": 20,
                },
                "cache_read_input_tokens": 8,
            },
        ),
    ),
    "refusal": (message_events(stop="refusal"), message(stop="refusal")),
    "events of a later version": (
        message_events(
            block_events(0, TEXT, {"type": "later_delta", "later": 1}, *text_deltas("Seine")),
            [{"type": "later_event", "index": 0}],
        ),
        message({"type": "text", "text": "Seine"}),
    ),
}


STREAMS = [
    *(pytest.param(OPENAI, *case, id=name) for name, case in OPENAI_STREAMS.items()),
    *(
        pytest.param(ANTHROPIC, *case, id=f"anthropic {name}")
        for name, case in ANTHROPIC_STREAMS.items()
    ),
]


@pytest.mark.parametrize(("row", "events", "whole"), STREAMS)
def test_a_stream_folds_into_what_the_whole_answer_reads_as(
    row: ember.Provider, events: list[Any], whole: Any
) -> None:
    """All fields but `raw`; and the pieces are the text."""
    streamed, pieces = fold(row, events)
    expected = row.decode(whole)
    assert dataclasses.replace(streamed, raw=None) == dataclasses.replace(expected, raw=None)
    assert "".join(pieces) == expected.text


def test_citations_of_a_stream_are_kept() -> None:
    """They come one by one."""
    cites = [{"type": "citations_delta", "citation": {"cited_text": text}} for text in "ab"]
    body: dict[str, Any] = {}
    for event in message_events(block_events(0, TEXT, *text_deltas("Seine"), *cites)):
        ANTHROPIC.decode_event(body, event)
    assert body["content"][0]["citations"] == [{"cited_text": "a"}, {"cited_text": "b"}]


def test_a_tool_input_cut_short_is_kept_as_text() -> None:
    """As an answer that hit max_tokens leaves it."""
    events = message_events(block_events(0, USED, *json_deltas('{"a": ')), stop="max_tokens")
    reply, _ = fold(ANTHROPIC, events)
    assert reply.tool_calls == (ToolCall("t1", "add", '{"a": '),)
    assert reply.finish == "max_tokens"


@pytest.mark.parametrize(
    ("row", "start", "event", "end"),
    [
        (OPENAI, [], chunk({"content": "abcd" * 500}), [chunk({}, "stop")]),
        (
            ANTHROPIC,
            message_events()[:1] + block_events(0, TEXT)[:1],
            block_events(0, TEXT, *text_deltas("abcd" * 500))[1],
            message_events()[-2:],
        ),
    ],
    ids=["openai", "anthropic"],
)
def test_a_long_stream_folds_as_a_short_one_does(
    row: ember.Provider, start: list[Any], event: Any, end: list[Any]
) -> None:
    """6 MB; it takes seconds, not milliseconds, if each event copies the text before it."""
    reply, pieces = fold(row, [*start, *[event] * 3000, *end])
    assert reply.text == "abcd" * 1_500_000
    assert len(pieces) == 3000


@pytest.mark.parametrize("kind", ["application/json", "application/json; charset=utf-8"])
@pytest.mark.parametrize(
    ("spec", "raw"),
    [
        ("openai:m", completion({"content": "Seine"}, usage=COUNTS)),
        ("anthropic:m", message({"type": "text", "text": "Seine"})),
    ],
)
async def test_a_whole_answer_to_a_stream_request_is_one_piece(
    spec: str, raw: Any, kind: str
) -> None:
    """Some servers do not stream. It is complete: it is not asked for again."""
    sent: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        sent.append(request)
        return httpx.Response(200, headers={"content-type": kind}, content=json.dumps(raw))

    asked = ember.model(spec, api_key="k", transport=httpx.MockTransport(answer))
    async with asked.stream("a question") as stream:
        assert [piece async for piece in stream] == ["Seine"]
    assert stream.reply.text == "Seine"
    assert len(sent) == 1


@pytest.mark.parametrize(
    ("row", "raw"),
    [
        (OPENAI, {}),
        (OPENAI, {"choices": None}),
        (OPENAI, {"choices": "x"}),
        (OPENAI, {"choices": [None]}),
        (OPENAI, {"choices": [{}]}),
        (OPENAI, {"choices": [{"message": None}]}),
        (OPENAI, {"choices": [{"message": {"content": 7}}]}),
        (OPENAI, {"choices": [{"message": {"content": [7]}}]}),
        (OPENAI, {"choices": [{"message": {"tool_calls": [{"id": "a"}]}}]}),
        (ANTHROPIC, {}),
        (ANTHROPIC, {"content": None}),
        (ANTHROPIC, {"content": "x"}),
        (ANTHROPIC, {"content": [None]}),
        (ANTHROPIC, {"content": [{}]}),
        (ANTHROPIC, {"content": [{"type": "text"}]}),
        (ANTHROPIC, {"content": [{"type": "tool_use"}]}),
    ],
)
async def test_a_malformed_answer_is_a_reply_error_that_keeps_it(
    row: ember.Provider, raw: Any
) -> None:
    """Never a KeyError from within."""
    name = {"openai": "gpt-4o", "anthropic": "claude-sonnet-4-5"}[row.name]
    called = ember.model(f"{row.name}:{name}", api_key="k", retries=0, transport=answering(raw))
    with pytest.raises(ember.ReplyError) as caught:
        await called("a question")
    assert caught.value.raw is not None
