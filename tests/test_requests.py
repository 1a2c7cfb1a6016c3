"""What is sent: the body of every row for every parameter, exact, and by the official schemas."""

import base64
import copy
import dataclasses
import datetime as dt
import enum
import json
import re
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import httpx
import pydantic
import pytest
from official import (
    anthropic_schema_problems,
    chat_problems,
    embedding_problems,
    message_problems,
    strict_problems,
)
from server import WIRES, Wire, sse
from typing_extensions import TypedDict

import ember

OPENAI_ROWS = [name for name in ember.providers if name != "anthropic"]
ROWS = list(ember.providers)
HOSTED = [name for name in ROWS if name != "local"]

# Where a row's words are not OpenAI's: its word → OpenAI's
WORDS = {
    "mistral": {"random_seed": "seed"},
    "watsonx": {"model_id": "model", "inputs": "input"},
}
OWN = {"watsonx": {"project_id"}}  # fields that OpenAI does not have
# What a row refuses (Mistral with a 422, Groq and Cerebras with a 400), at any depth
REFUSED = {
    "mistral": {"seed", "max_completion_tokens", "stream_options", "reasoning_content"},
    "groq": {"reasoning", "reasoning_content", "reasoning_details", "logprobs", "n"},
    "cerebras": {"parallel_tool_calls", "reasoning_content", "frequency_penalty"},
    "watsonx": {"model", "stream", "stream_options"},
    "ollama": {"max_completion_tokens", "n"},
}


def check(row: str, body: dict[str, Any]) -> None:
    """By the schema of the row's wire, and the row's own refusals."""
    if row == "anthropic":
        assert message_problems(body) == []
        return
    refused = REFUSED.get(row, set())
    assert not [key for key in keys(body) if key in refused]
    words = WORDS.get(row, {})
    body = {words.get(k, k): v for k, v in body.items() if k not in OWN.get(row, ())}
    wrong = embedding_problems(body) if "input" in body else chat_problems(body)
    assert wrong == []


def keys(value: Any) -> Iterator[str]:
    """The keys at every depth, but those of JSON schemas."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            if key not in ("parameters", "schema", "input_schema"):
                yield from keys(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from keys(inner)


# ── Pure: encode ───

USER = {"role": "user", "content": "a question"}
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "The sum.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer", "default": 1}},
            "required": ["a"],
            "additionalProperties": False,
        },
    },
}
CALL = {"id": "abcdefgh1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
LATER = {**CALL, "id": "abcdefgh2"}
LOOP = [
    USER,
    {"role": "assistant", "content": None, "tool_calls": [CALL, LATER]},
    {"role": "tool", "tool_call_id": "abcdefgh1", "content": "2"},
    {"role": "tool", "tool_call_id": "abcdefgh2", "content": "no such tool"},
]
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="
)
PNG_URL = "data:image/png;base64," + base64.b64encode(PNG).decode()
PARTS = [
    {"type": "text", "text": "What is it?"},
    {"type": "image_url", "image_url": {"url": PNG_URL}},
    {"type": "image_url", "image_url": {"url": "https://pictures.example/a.png"}},
]
SCHEMA = {
    "title": "City",
    "type": "object",
    "properties": {"name": {"type": "string"}, "people": {"type": "integer"}},
    "required": ["name"],
}
STRICT = {
    **SCHEMA,
    "required": ["name", "people"],
    "additionalProperties": False,
}
REQUESTS = {
    "text": ember.Request("m", [USER]),
    "system": ember.Request("m", [{"role": "system", "content": "Be brief."}, USER]),
    "turns": ember.Request("m", [USER, {"role": "assistant", "content": "an answer"}, USER]),
    "parameters": ember.Request("m", [USER], temperature=0.5, max_tokens=9, stop=["END", "."]),
    "images": ember.Request("m", [{"role": "user", "content": PARTS}]),
    "tools": ember.Request("m", [USER], tools=[ADD]),
    "tool loop": ember.Request("m", LOOP, tools=[ADD]),
    "schema": ember.Request("m", [USER], schema=SCHEMA),
    "open schema": ember.Request("m", [USER], schema={"type": "object", "title": "Any thing"}),
    "schema and tools": ember.Request("m", LOOP, tools=[ADD], schema=SCHEMA),
    "stream": ember.Request("m", [USER], stream=True),
    "stream with tools": ember.Request("m", LOOP, tools=[ADD], stream=True),
}


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("request_", REQUESTS.values(), ids=REQUESTS)
def test_a_body_is_valid_by_the_official_schema(row: str, request_: ember.Request) -> None:
    """Every row, every parameter; and the request is not changed."""
    before = copy.deepcopy(request_)
    check(row, ember.providers[row].encode(request_))
    assert request_ == before


def body(row: str, **request: Any) -> dict[str, Any]:
    """The body of a request with one message."""
    return ember.providers[row].encode(ember.Request("m", [USER], **request))


RENAMED = ("openai", "azure", "groq", "xai", "cerebras")


@pytest.mark.parametrize("row", OPENAI_ROWS)
def test_parameters_have_the_rows_names(row: str) -> None:
    """Exact: nothing is dropped, nothing is added."""
    tokens = "max_completion_tokens" if row in RENAMED else "max_tokens"
    expected = {
        "model_id" if row == "watsonx" else "model": "m",
        "messages": [USER],
        "temperature": 0,
        tokens: 9,
        "stop": ["END"],
        "random_seed" if row == "mistral" else "seed": 7,
        "tools": [ADD],
        "reasoning_effort": "low",
    }
    options = {"reasoning_effort": "low"}
    request = {"temperature": 0, "max_tokens": 9, "stop": ("END",), "seed": 7, "tools": (ADD,)}
    assert body(row, options=options, **request) == expected


def test_parameters_have_anthropics_names() -> None:
    """Exact: a compulsory maximum, `stop_sequences`, tools without a wrapper."""
    tool = {key: ADD["function"][key] for key in ("name", "description")}  # type: ignore[index]
    request = {"temperature": 0, "max_tokens": 9, "stop": ("END",), "tools": (ADD,)}
    assert body("anthropic", options={"top_k": 5}, **request) == {
        "model": "m",
        "messages": [USER],
        "temperature": 0,
        "max_tokens": 9,
        "stop_sequences": ["END"],
        "tools": [{**tool, "input_schema": ADD["function"]["parameters"]}],  # type: ignore[index]
        "top_k": 5,
    }


def test_anthropic_has_no_seed_and_says_so() -> None:
    """No parameter is dropped in silence."""
    with pytest.raises(ember.SetupError, match="seed"):
        body("anthropic", seed=7)


@pytest.mark.parametrize("row", ROWS)
def test_a_bare_request_holds_nothing_else(row: str) -> None:
    """No defaults of ours, but Anthropic's compulsory maximum."""
    sent = body(row)
    assert sent.pop("max_tokens", None) == (64_000 if row == "anthropic" else None)
    assert sent == {"model_id" if row == "watsonx" else "model": "m", "messages": [USER]}


@pytest.mark.parametrize("row", ROWS)
def test_a_stream_asks_for_usage_where_it_must(row: str) -> None:
    """Mistral refuses the question, watsonx streams on a path of its own."""
    sent = {k: v for k, v in body(row, stream=True).items() if k.startswith("stream")}
    expected = {
        "anthropic": {"stream": True},
        "mistral": {"stream": True},
        "watsonx": {},
    }
    asked = {"stream": True, "stream_options": {"include_usage": True}}
    assert sent == expected.get(row, asked)


@pytest.mark.parametrize("row", OPENAI_ROWS)
def test_options_pass_untouched_and_win(row: str) -> None:
    """Whatever the provider will say of them."""
    options = {"top_p": 0.5, "made_up": {"a": [1, None]}, "response_format": {"type": "text"}}
    sent = body(row, options=options, schema=SCHEMA)
    assert {key: sent[key] for key in options} == options


@pytest.mark.parametrize("row", OPENAI_ROWS)
def test_a_schema_is_sent_strict_where_the_row_knows_schemas(row: str) -> None:
    """Closed, every property required; or in words."""
    sent = body(row, schema=SCHEMA)
    if row in ("deepseek", "groq"):
        assert sent["response_format"] == {"type": "json_object"}
        assert sent["messages"][-1] == USER
        assert json.dumps(SCHEMA) in sent["messages"][0]["content"]
        assert "JSON" in sent["messages"][0]["content"]  # DeepSeek and Groq demand the word
    else:
        wanted = {"name": "City", "schema": STRICT, "strict": True}
        assert sent["response_format"] == {"type": "json_schema", "json_schema": wanted}
        assert sent["messages"] == [USER]


def test_anthropic_takes_a_schema_without_a_name() -> None:
    """In `output_config`, beside what else is there."""
    sent = body("anthropic", schema=SCHEMA, options={"output_config": {"effort": "low"}})
    wanted = {"type": "json_schema", "schema": STRICT}
    assert sent["output_config"] == {"effort": "low", "format": wanted}


def test_an_instruction_joins_the_system_message() -> None:
    """There is still one, and the conversation stays as it is."""
    system = {"role": "system", "content": "Be brief."}
    request = ember.Request("m", [system, USER], schema=SCHEMA)
    first, second = ember.providers["deepseek"].encode(request)["messages"]
    assert first["content"].startswith("Be brief.\n")
    assert second == USER


def test_anthropic_turns_hold_all_results_of_one_turns_tools() -> None:
    """In one user message, before anything else."""
    request = ember.Request("m", [*LOOP, USER], tools=[ADD])
    turns = ember.providers["anthropic"].encode(request)["messages"]
    use = {"type": "tool_use", "name": "add", "input": {"a": 1}}
    result = {"type": "tool_result"}
    assert turns[:3] == [
        USER,
        {"role": "assistant", "content": [{**use, "id": "abcdefgh1"}, {**use, "id": "abcdefgh2"}]},
        {
            "role": "user",
            "content": [
                {**result, "tool_use_id": "abcdefgh1", "content": "2"},
                {**result, "tool_use_id": "abcdefgh2", "content": "no such tool"},
            ],
        },
    ]
    assert turns[3:] == [USER]


def test_anthropic_has_the_system_message_apart() -> None:
    """Several are joined."""
    said = [{"role": "system", "content": "A."}, {"role": "developer", "content": "B."}, USER]
    sent = ember.providers["anthropic"].encode(ember.Request("m", said))
    assert (sent["system"], sent["messages"]) == ("A.\n\nB.", [USER])


def test_anthropic_images_are_blocks() -> None:
    """From data URLs and from addresses."""
    request = ember.Request("m", [{"role": "user", "content": PARTS}])
    (turn,) = ember.providers["anthropic"].encode(request)["messages"]
    data = base64.b64encode(PNG).decode()
    assert turn["content"] == [
        PARTS[0],
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": data}},
        {"type": "image", "source": {"type": "url", "url": "https://pictures.example/a.png"}},
    ]


@pytest.mark.parametrize("row", ["groq", "mistral", "cerebras"])
def test_reasoning_is_not_shown_to_rows_that_refuse_it(row: str) -> None:
    """The rest of the turn stays."""
    turn = {"role": "assistant", "content": "a", "reasoning_content": "Hm", "reasoning": "Hm"}
    sent = ember.providers[row].encode(ember.Request("m", [USER, turn, USER]))
    assert sent["messages"][1] == {"role": "assistant", "content": "a"}


@pytest.mark.parametrize("row", ["deepseek", "openrouter", "vllm"])
def test_reasoning_is_shown_to_rows_that_demand_it(row: str) -> None:
    """As it was."""
    turn = {"role": "assistant", "content": "a", "reasoning_content": "Hm"}
    sent = ember.providers[row].encode(ember.Request("m", [USER, turn, USER]))
    assert sent["messages"][1] == turn


@pytest.mark.parametrize("row", [name for name in ROWS if ember.providers[name].embed_path])
def test_embeddings_are_asked_for_in_the_rows_words(row: str) -> None:
    """With options; valid by OpenAI's schema."""
    request = ember.Request("m", texts=["a", "b"], options={"dimensions": 8})
    sent = ember.providers[row].encode(request)
    names = ("model_id", "inputs") if row == "watsonx" else ("model", "input")
    assert sent == {names[0]: "m", names[1]: ["a", "b"], "dimensions": 8}
    check(row, sent)


# ── Schemas ───


class Kind(enum.Enum):
    SMALL = "small"
    LARGE = "large"


class Address(pydantic.BaseModel):
    """Where."""

    street: str = pydantic.Field(min_length=1, max_length=80)
    number: Annotated[int, pydantic.Field(ge=1, lt=10_000)] | None = None


class Person(pydantic.BaseModel):
    """Who."""

    name: str = pydantic.Field(description="What they are called (?)", pattern="^[A-Z]")
    kind: Kind = Kind.SMALL
    tags: Annotated[list[str], pydantic.Field(min_length=2)] = []
    home: Address = pydantic.Field(description="where they live")
    others: list[Address] = []
    mood: Literal["good", "bad (?)", 3] = "good"
    born: str = pydantic.Field("", json_schema_extra={"format": "color"})
    seen: bool | None = None


class Tree(pydantic.BaseModel):
    """A tree."""

    name: str
    branches: list["Tree"] = []


class Circle(pydantic.BaseModel):
    shape: Literal["circle"]
    radius: float


class Square(pydantic.BaseModel):
    shape: Literal["square"]
    side: float


class Drawing(pydantic.BaseModel):
    parts: list[Annotated[Circle | Square, pydantic.Field(discriminator="shape")]]


class Point(TypedDict, total=False):
    x: float
    y: float


class Pair(NamedTuple):
    first: int
    second: str


@dataclasses.dataclass
class Node:
    """A node."""

    at: dt.datetime
    id: uuid.UUID
    link: pydantic.AnyUrl | None = None
    next: "Node | None" = None


TYPES = [
    Address,
    Person,
    Tree,
    Drawing,
    Point,
    Kind,
    list[Tree],
    int,
    float,
    bool,
    str,
    list[int],
    list[Address],
    Literal["a", "b"],
    int | None,
    Address | Point,
    dict[str, int],
    dict[str, Any],
    tuple[int, str],
    tuple[int, ...],
    list[Any],
    set[int],
    Any,
    Node,
    Pair,
    bytes,
    dt.date,
    list[list[int]],
    dict[str, list[Node]],
    Literal["x"],
    list[Node | None],
]


class Sent:
    """A transport that keeps what was sent, and plays answers; the last one for ever."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.requests: list[httpx.Request] = []
        self.transport = httpx.MockTransport(self._answer)

    def _answer(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, bytes):
            return httpx.Response(
                200, headers={"content-type": "text/event-stream"}, content=answer
            )
        return httpx.Response(200, json=answer)

    @property
    def bodies(self) -> list[Any]:
        """The bodies, parsed."""
        return [json.loads(request.content) for request in self.requests]


def connect(row: str, sent: Sent, **options: Any) -> ember.Model:
    """A model of this row that talks to the transport."""
    here = {"base_url": "http://127.0.0.1:1", "api_key": "k", "retries": 0}
    here |= {"project_id": "p"} if row == "watsonx" else {}
    return ember.model(f"{row}:m", transport=sent.transport, **{**here, **options})


def wire(row: str) -> Wire:
    """The wire of a row."""
    return WIRES["anthropic" if row == "anthropic" else "openai"]


@pytest.mark.parametrize("output", TYPES, ids=str)
@pytest.mark.parametrize("row", ["openai", "anthropic", "deepseek"])
async def test_every_type_makes_a_schema_that_the_provider_takes(row: str, output: Any) -> None:
    """Strict mode's demands on OpenAI, the output format's on Anthropic, else words."""
    sent = Sent(wire(row).answer("{}", finish="length"))
    with pytest.raises(ember.ReplyError):
        await connect(row, sent)("a question", output=output)
    (asked,) = sent.bodies
    wanted = asked.get("response_format", asked.get("output_config"))
    if row == "openai":
        named = wanted["json_schema"]
        assert strict_problems(named["schema"]) == [] or named["strict"] is False
    elif wanted and row == "anthropic":
        assert anthropic_schema_problems(wanted["format"]["schema"]) == []
        assert not recurses(wanted["format"]["schema"])
    check(row, asked)


def recurses(schema: Any) -> bool:
    """Whether a definition leads to itself, which Anthropic refuses."""
    names = {
        n: set(re.findall(r"#/\$defs/(\w+)", str(d))) for n, d in schema.get("$defs", {}).items()
    }
    for _ in names:
        names = {n: found.union(*(names[m] for m in found)) for n, found in names.items()}
    return any(name in found for name, found in names.items())


STRICTLY = [Address, Person, Tree, Drawing, Point, Node, Kind, int, list[Node], int | None, bytes]


@pytest.mark.parametrize("output", STRICTLY, ids=str)
async def test_a_plain_type_is_decoded_strictly(output: Any) -> None:
    """Most types can be: `strict: false` is for open ones."""
    sent = Sent(wire("openai").answer("{}", finish="length"))
    with pytest.raises(ember.ReplyError):
        await connect("openai", sent)("a question", output=output)
    wanted = sent.bodies[0]["response_format"]["json_schema"]
    assert wanted["strict"] is True


async def test_no_constraint_of_a_type_is_lost() -> None:
    """What has no keyword stands in the description."""
    sent = Sent(wire("anthropic").answer("{}", finish="max_tokens"))
    with pytest.raises(ember.ReplyError):
        await connect("anthropic", sent)("a question", output=Person)
    schema = sent.bodies[0]["output_config"]["format"]["schema"]
    street = schema["$defs"]["Address"]["properties"]["street"]
    assert "maxLength: 80" in street["description"]
    assert "^[A-Z]" in schema["properties"]["name"]["description"]
    assert schema["properties"]["mood"]["enum"] == ["good", "bad (?)", 3]
    assert schema["$defs"]["Kind"]["enum"] == ["small", "large"]


# ── Whole calls ─── as they go over the wire


@pytest.mark.parametrize("row", HOSTED)
async def test_a_call_sends_system_prompt_and_parameters(row: str) -> None:
    """A text becomes one message of the user's."""
    sent = Sent(wire(row).answer("right"))
    reply = await connect(row, sent)(
        "{a} %s {", system="Be {brief}.", max_tokens=9, stop="END", temperature=1
    )
    assert reply.text == "right"
    (asked,) = sent.bodies
    said = [{"role": "user", "content": "{a} %s {"}]
    if row == "anthropic":
        assert (asked["system"], asked["messages"]) == ("Be {brief}.", said)
        assert asked["stop_sequences"] == ["END"]
    else:
        assert asked["messages"] == [{"role": "system", "content": "Be {brief}."}, *said]
        assert asked["stop"] == ["END"]
    check(row, asked)


@pytest.mark.parametrize("row", HOSTED)
async def test_a_call_goes_to_the_rows_path_with_the_rows_headers(row: str) -> None:
    """The key where the row has it, and nowhere else."""
    sent = Sent(wire(row).answer("right"))
    await connect(row, sent, base_url="http://127.0.0.1:1/base/")("a question")
    (request,) = sent.requests
    paths = {
        "anthropic": "/base/v1/messages",
        "azure": "/base/openai/deployments/m/chat/completions",
        "watsonx": "/base/ml/v1/text/chat",
    }
    assert request.method == "POST"
    assert request.url.path == paths.get(row, "/base/chat/completions")
    assert set(request.url.params) == {"azure": {"api-version"}, "watsonx": {"version"}}.get(
        row, set()
    )
    assert request.headers["content-type"] == "application/json"
    holders = {name for name, value in request.headers.items() if value in ("k", "Bearer k")}
    assert holders == {{"anthropic": "x-api-key", "azure": "api-key"}.get(row, "authorization")}
    if row == "anthropic":
        assert request.headers["anthropic-version"] == "2023-06-01"


@pytest.mark.parametrize("row", HOSTED)
async def test_a_prompt_may_be_a_list_of_messages(row: str) -> None:
    """With parts, tool calls and results in OpenAI's form; it is not changed."""
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": PARTS}]
    prompt += [*LOOP[1:], {"role": "assistant", "content": "Done."}, USER]
    before = copy.deepcopy(prompt)
    sent = Sent(wire(row).answer("right"))
    await connect(row, sent)(prompt)
    assert prompt == before
    if row != "anthropic":
        assert sent.bodies[0]["messages"] == before
    check(row, sent.bodies[0])


@pytest.mark.parametrize("row", HOSTED)
async def test_images_are_sent_from_bytes_paths_and_addresses(row: str, tmp_path: Path) -> None:
    """After the text, in the last message of the user's."""
    file = tmp_path / "a picture.png"
    file.write_bytes(PNG)
    address = "https://pictures.example/a.png"
    images = [PNG, file, str(file), address, PNG_URL]
    sent = Sent(wire(row).answer("right"))
    await connect(row, sent)("What is it?", system="Be brief.", images=images)
    (asked,) = sent.bodies
    parts = asked["messages"][-1]["content"]
    assert parts[0] == PARTS[0]
    if row == "anthropic":
        data = {"type": "base64", "media_type": "image/png", "data": base64.b64encode(PNG).decode()}
        sources = [data, data, data, {"type": "url", "url": address}, data]
        assert parts[1:] == [{"type": "image", "source": source} for source in sources]
    else:
        urls = [PNG_URL, PNG_URL, PNG_URL, address, PNG_URL]
        assert parts[1:] == [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    check(row, asked)


def add(a: int, b: int = 1) -> int:
    """The sum."""
    return a + b


async def fail(reason: str) -> str:
    """Fail for a reason."""
    raise LookupError(f"no {reason} here")


def asking(row: str) -> Any:
    """An answer that calls both tools, and one that does not exist."""
    calls = [("add", {"a": 1}), ("fail", {"reason": "luck"}), ("other", {})]
    if row == "anthropic":
        blocks = [
            {"type": "tool_use", "id": f"callid{i:03}", "name": name, "input": arguments}
            for i, (name, arguments) in enumerate(calls)
        ]
        return wire(row).answer(None, finish="tool_use", content=blocks)
    functions = [{"name": name, "arguments": json.dumps(arguments)} for name, arguments in calls]
    called = [
        {"id": f"callid{i:03}", "type": "function", "function": function}
        for i, function in enumerate(functions)
    ]
    return wire(row).answer(None, finish="tool_calls", tool_calls=called)


@pytest.mark.parametrize("row", HOSTED)
async def test_the_second_request_of_a_tool_loop_holds_the_results(row: str) -> None:
    """In the order of the calls, errors too; and both requests are valid."""
    sent = Sent(asking(row), wire(row).answer("right"))
    reply = await connect(row, sent)("a question", tools=[add, fail])
    assert reply.text == "right"
    first, second = sent.bodies
    assert second["tools"] == first["tools"]
    if row == "anthropic":
        results = second["messages"][-1]["content"]
        assert [r["tool_use_id"] for r in results] == ["callid000", "callid001", "callid002"]
    else:
        results = second["messages"][-3:]
        assert [r["tool_call_id"] for r in results] == ["callid000", "callid001", "callid002"]
    assert results[0]["content"] == "2"
    assert "no luck here" in results[1]["content"]
    assert "other" in results[2]["content"]
    check(row, first)
    check(row, second)


async def test_a_function_is_described_by_its_signature_and_docstring() -> None:
    """Exact."""
    sent = Sent(wire("openai").answer("right"))
    await connect("openai", sent)("a question", tools=[add])
    (tool,) = sent.bodies[0]["tools"]
    assert tool["function"]["name"] == "add"
    assert tool["function"]["description"] == "The sum."
    parameters = tool["function"]["parameters"]
    assert parameters["type"] == "object"
    assert {name: field["type"] for name, field in parameters["properties"].items()} == {
        "a": "integer",
        "b": "integer",
    }
    assert parameters["required"] == ["a"]


@pytest.mark.parametrize("row", HOSTED)
async def test_a_wrong_answer_is_asked_again_with_the_error(row: str) -> None:
    """In the same conversation, and validly."""
    wrong, right = wire(row).answer('{"value": "x"}'), wire(row).answer('{"value": 7}')
    sent = Sent(wrong, right)
    reply = await connect(row, sent)("a question", output=int)
    assert reply.data == 7
    first, second = sent.bodies
    turns = second["messages"][len(first["messages"]) :]
    assert [turn["role"] for turn in turns] == ["assistant", "user"]
    assert "integer" in turns[1]["content"]
    check(row, first)
    check(row, second)


@pytest.mark.parametrize("row", HOSTED)
async def test_a_streamed_call_sends_what_a_plain_one_sends(row: str) -> None:
    """And what makes it a stream."""
    plain, streamed = Sent(wire(row).answer("right")), Sent(sse(wire(row).events("right")))
    options: dict[str, Any] = {"system": "Be brief.", "max_tokens": 9, "temperature": 0.5}
    await connect(row, plain)("a question", **options)
    async with connect(row, streamed).stream("a question", **options) as stream:
        assert [piece async for piece in stream] == ["right"]
    (first,), (second,) = plain.bodies, streamed.bodies
    assert first == {k: v for k, v in second.items() if not k.startswith("stream")}
    if row == "watsonx":
        assert streamed.requests[0].url.path == "/ml/v1/text/chat_stream"
    check(row, second)


@pytest.mark.parametrize("row", ["openai", "mistral", "gemini", "anthropic"])
async def test_a_streamed_tool_call_is_answered_as_a_plain_one_is(row: str) -> None:
    """The second request is the same, but for what makes it a stream."""
    plain = Sent(asking(row), wire(row).answer("right"))
    streamed = Sent(sse(as_events(row, asking(row))), sse(wire(row).events("right")))
    await connect(row, plain)("a question", tools=[add, fail])
    async with connect(row, streamed).stream("a question", tools=[add, fail]) as stream:
        assert [piece async for piece in stream] == ["right"]
    first, second = plain.bodies[1], streamed.bodies[1]
    assert first == {k: v for k, v in second.items() if not k.startswith("stream")}
    check(row, second)


def as_events(row: str, answer: Any) -> list[Any]:
    """The answer as a stream that delivers each call at once."""
    if row == "anthropic":
        end = {"type": "message_delta", "delta": {"stop_reason": "tool_use"}, "usage": {}}
        events = [{"type": "message_start", "message": {**answer, "content": []}}]
        for index, block in enumerate(answer["content"]):
            start = {"type": "content_block_start", "index": index}
            delta = {"type": "input_json_delta", "partial_json": json.dumps(block["input"])}
            events.append({**start, "content_block": {**block, "input": {}}})
            events.append({"type": "content_block_delta", "index": index, "delta": delta})
            events.append({"type": "content_block_stop", "index": index})
        return [*events, end, {"type": "message_stop"}]
    said = answer["choices"][0]["message"]
    calls = [{**call, "index": index} for index, call in enumerate(said["tool_calls"])]
    choice = {"index": 0, "delta": {**said, "tool_calls": calls}, "finish_reason": "tool_calls"}
    return [{"choices": [choice]}, "[DONE]"]


@pytest.mark.parametrize("row", [name for name in HOSTED if ember.providers[name].embed_path])
async def test_embeddings_are_split_to_the_rows_limit_and_keep_their_order(row: str) -> None:
    """One request a batch, each valid; answers may come in any order."""
    size = ember.providers[row].embed_size
    texts = [str(i) for i in range(size + 1)]
    sent = Sent(None)

    def vectors(request: httpx.Request) -> httpx.Response:
        sent.requests.append(request)
        asked = json.loads(request.content)
        batch = asked.get("inputs", asked.get("input"))
        if row == "watsonx":
            return httpx.Response(200, json={"results": [{"embedding": [float(t)]} for t in batch]})
        data = [{"index": i, "embedding": [float(t)]} for i, t in enumerate(batch)]
        return httpx.Response(200, json={"data": data[::-1], "usage": {"prompt_tokens": 1}})

    sent.transport = httpx.MockTransport(vectors)
    found = await connect(row, sent).embed(texts)
    assert found == [[float(text)] for text in texts]
    assert sorted(len(b.get("inputs", b.get("input"))) for b in sent.bodies) == [1, size]
    for asked in sent.bodies:
        check(row, asked)


# ── The check itself ───


@pytest.mark.parametrize(
    "spoil",
    [
        lambda body: body.update(made_up=1),
        lambda body: body.update(temperature="0"),
        lambda body: body.update(max_completion_tokens=9.5),
        lambda body: body.update(stop=("a", 1)),
        lambda body: body.pop("model"),
        lambda body: body["messages"][0].update(made_up=1),
        lambda body: body["messages"][0].update(role="nobody"),
        lambda body: body["messages"][1]["tool_calls"][0].update(index=0),
        lambda body: body["messages"][1]["tool_calls"][0]["function"].update(arguments={}),
        lambda body: body["messages"][2].update(tool_call_id="another"),
        lambda body: body["messages"].pop(),
        lambda body: body["tools"][0]["function"].update(name="a b"),
        lambda body: body["tools"][0].pop("type"),
        lambda body: body.update(response_format={"type": "json_schema", "schema": {}}),
    ],
)
def test_the_strict_check_finds_what_is_wrong(spoil: Callable[[Any], Any]) -> None:
    """At any depth: this is a test of the tests."""
    pytest.importorskip("openai")
    right = {"model": "m", "messages": copy.deepcopy(LOOP), "tools": [copy.deepcopy(ADD)]}
    assert chat_problems(right) == []
    spoil(right)
    assert chat_problems(right) != []


@pytest.mark.parametrize(
    "spoil",
    [
        lambda body: body.update(seed=1),
        lambda body: body.pop("max_tokens"),
        lambda body: body["messages"][1]["content"][0].update(caller_={}),
        lambda body: body["messages"][2]["content"].reverse(),
        lambda body: body["messages"][2]["content"].pop(0),
        lambda body: body["messages"].pop(),
        lambda body: body["tools"][0].update(parameters={}),
        lambda body: body.update(
            output_config={"format": {"type": "json_schema", "schema": {"type": "object"}}}
        ),
    ],
)
def test_the_strict_check_of_messages_finds_what_is_wrong(spoil: Callable[[Any], Any]) -> None:
    """At any depth: this is a test of the tests."""
    pytest.importorskip("anthropic")
    use = {"type": "tool_use", "id": "t1", "name": "add", "input": {"a": 1}}
    result = {"type": "tool_result", "tool_use_id": "t1", "content": "2"}
    right = {
        "model": "m",
        "max_tokens": 9,
        "messages": [
            {"role": "user", "content": "a question"},
            {"role": "assistant", "content": [use]},
            {"role": "user", "content": [result, {"type": "text", "text": "Go on."}]},
        ],
        "tools": [{"name": "add", "input_schema": {"type": "object"}}],
    }
    assert message_problems(right) == []
    spoil(right)
    assert message_problems(right) != []


def test_what_llama_cpp_can_hold_to_stays_in_the_schema() -> None:
    number, text = {"type": "integer", "minimum": 1, "maximum": 10}, {"type": "string"}
    schema = {
        "type": "object", "required": ["a", "b", "c"],
        "properties": {
            "a": number, "b": {**text, "maxLength": 300}, "c": {**text, "maxLength": 5000},
        },
    }  # fmt: skip
    request = ember.Request("m", [{"role": "user", "content": "x"}], schema=schema)
    for row, kept in (("local", True), ("llamacpp", True), ("openai", False)):
        body = ember.providers[row].encode(request)
        sent = body["response_format"]["json_schema"]["schema"]["properties"]
        assert (sent["a"] == number, "maxLength" in sent["b"]) == (kept, kept)
        assert "maxLength" not in sent["c"]  # a grammar of so many rules is refused
        assert sent["c"]["description"] == "maxLength: 5000"
