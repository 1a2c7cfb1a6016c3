"""Strict checks of a request body against the official SDKs' types, and of what is sent in schemas.

Each check returns a list of what is wrong, empty where nothing is:

    assert chat_problems(body) == []

The SDKs describe their parameters as TypedDicts. Here these are closed: a key that a TypedDict
does not name is a problem at any depth, except in the mappings that are free (JSON schemas).
"""

import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from types import UnionType
from typing import Annotated, Any, Literal, NotRequired, Required, Union, get_args, get_origin

import pytest
import typing_extensions

NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
ARRAYS = (list, Iterable, Sequence)
NUMBERS = {float: (int, float), int: (int,)}
MODIFIERS = (Required, NotRequired, typing_extensions.Required, typing_extensions.NotRequired)


# ── Types ─── does a JSON value have this type, with no key too many?


@functools.cache
def _fields(kind: type) -> dict[str, tuple[Any, bool]]:
    """The type of each key of a TypedDict, and whether the key must be there."""
    hints = typing_extensions.get_type_hints(kind, include_extras=True)
    fields: dict[str, tuple[Any, bool]] = {}
    for name, hint in hints.items():
        if get_origin(hint) in MODIFIERS:
            required = get_origin(hint) in (Required, typing_extensions.Required)
            fields[name] = (get_args(hint)[0], required)
        else:
            fields[name] = (hint, name in kind.__required_keys__)  # type: ignore[attr-defined]
    return fields


def _object_problems(value: Any, kind: type, where: str) -> list[str]:
    if not isinstance(value, dict):
        return [f"{where}: {value!r} is no {kind.__name__}"]
    fields, open_ended = _fields(kind), getattr(kind, "__pydantic_config__", {})
    found = [f"{where}.{name}: is missing" for name, (_, must) in fields.items() if must]
    found = [problem for problem in found if problem.split(":")[0].rsplit(".", 1)[1] not in value]
    for name, item in value.items():
        if name in fields:
            found += problems(item, fields[name][0], f"{where}.{name}")
        elif open_ended.get("extra") != "allow":
            found.append(f"{where}.{name}: is unknown to {kind.__name__}")
    return found


def _union_problems(value: Any, kinds: Sequence[Any], where: str) -> list[str]:
    """The problems of the branch that fits best, preferring one with the right literals."""
    attempts = [problems(value, kind, where) for kind in kinds]
    return min(attempts, key=lambda found: (any("is none of" in f for f in found), len(found)))


def _each(items: Iterable[tuple[str, Any, Any]]) -> list[str]:
    return [found for where, item, kind in items for found in problems(item, kind, where)]


def problems(value: Any, kind: Any, where: str = "body") -> list[str]:
    """What keeps the JSON value from being of this type."""
    origin, arguments = get_origin(kind) or kind, get_args(kind)
    if kind is Any or kind is object:
        return []
    if typing_extensions.is_typeddict(kind):
        return _object_problems(value, kind, where)
    if origin is Annotated or origin in MODIFIERS:
        return problems(value, arguments[0], where)
    if origin in (Union, UnionType):
        return _union_problems(value, arguments, where)
    if origin is Literal:
        return [] if value in arguments else [f"{where}: {value!r} is none of {arguments}"]
    if origin in ARRAYS:
        if not isinstance(value, list):
            return [f"{where}: {value!r} is no list"]
        return _each((f"{where}[{i}]", item, arguments[0]) for i, item in enumerate(value))
    if origin in (dict, Mapping):
        if not isinstance(value, dict):
            return [f"{where}: {value!r} is no object"]
        return _each((f"{where}.{key}", item, arguments[1]) for key, item in value.items())
    if kind in (None, type(None)):
        return [] if value is None else [f"{where}: {value!r} is not null"]
    if kind in NUMBERS:
        right = isinstance(value, NUMBERS[kind]) and not isinstance(value, bool)
        return [] if right else [f"{where}: {value!r} is no {kind.__name__}"]
    if isinstance(kind, type) and kind in (str, bool):
        return [] if isinstance(value, kind) else [f"{where}: {value!r} is no {kind.__name__}"]
    return [f"{where}: cannot be checked, {kind!r} is no JSON type"]


# ── Bodies ───


def chat_problems(body: Mapping[str, Any]) -> list[str]:
    """What OpenAI's schema of a chat completion has against this body."""
    chat = pytest.importorskip("openai.types.chat.completion_create_params")
    body = json.loads(json.dumps(body))
    streams = body.get("stream")
    kind = (
        chat.CompletionCreateParamsStreaming if streams else chat.CompletionCreateParamsNonStreaming
    )
    if found := problems(body, kind):
        return found
    for tool in body.get("tools", []):
        found += _name_problems(tool["function"]["name"], "tool")
        if tool["function"].get("strict"):
            found += strict_problems(tool["function"]["parameters"])
    wanted = body.get("response_format", {})
    if wanted.get("type") == "json_schema":
        found += _name_problems(wanted["json_schema"]["name"], "schema")
        if wanted["json_schema"].get("strict"):
            found += strict_problems(wanted["json_schema"]["schema"])
    return found + _turn_problems(body["messages"])


def embedding_problems(body: Mapping[str, Any]) -> list[str]:
    """What OpenAI's schema of an embedding has against this body."""
    embed = pytest.importorskip("openai.types.embedding_create_params")
    return problems(json.loads(json.dumps(body)), embed.EmbeddingCreateParams)


def message_problems(body: Mapping[str, Any], sampling: bool = True) -> list[str]:
    """What Anthropic's schema of a message has against this body.

    The SDK's types no longer know `temperature`, which the API still takes: `sampling=False`
    counts it as unknown.
    """
    message = pytest.importorskip("anthropic.types.message_create_params")
    body = json.loads(json.dumps(body))
    if sampling and not problems(body.get("temperature", 0.0), float):
        body.pop("temperature", None)
    streams = body.get("stream")
    kinds = message.MessageCreateParamsStreaming, message.MessageCreateParamsNonStreaming
    if found := problems(body, kinds[not streams]):
        return found
    for tool in body.get("tools", []):
        found += _name_problems(tool["name"], "tool")
    wanted = body.get("output_config", {}).get("format")
    found += anthropic_schema_problems(wanted["schema"]) if wanted else []
    found += [] if body["messages"][0]["role"] == "user" else ["messages[0]: is not the user's"]
    return found + _block_problems(body["messages"])


def _name_problems(name: str, of: str) -> list[str]:
    return [] if NAME.fullmatch(name) else [f"{of}: the name {name!r} is refused"]


def _turn_problems(messages: Sequence[Any]) -> list[str]:
    """Every tool call is answered at once, and nothing else is answered."""
    found, open_calls = list[str](), list[str]()
    for at, message in enumerate(messages):
        if message["role"] == "tool":
            if message["tool_call_id"] not in open_calls:
                found.append(f"messages[{at}]: answers {message['tool_call_id']!r}, never asked")
            open_calls = [call for call in open_calls if call != message["tool_call_id"]]
        else:
            found += [f"messages[{at}]: comes before the answers to {open_calls}"] * bool(
                open_calls
            )
            open_calls = [call["id"] for call in message.get("tool_calls") or []]
    return found + [f"messages: {open_calls} are not answered"] * bool(open_calls)


def _block_problems(messages: Sequence[Any]) -> list[str]:
    """Tool results come first in the turn after their tool uses, and are complete."""
    found, asked = list[str](), list[str]()
    for at, message in enumerate(messages):
        content = message["content"]
        blocks = content if isinstance(content, list) else [{"type": "text", "text": content}]
        kinds = [block["type"] == "tool_result" for block in blocks]
        answered = [block["tool_use_id"] for block in blocks if block["type"] == "tool_result"]
        if sorted(answered) != sorted(asked):
            found.append(f"messages[{at}]: answers {answered}, asked were {asked}")
        if kinds != sorted(kinds, reverse=True):
            found.append(f"messages[{at}]: has content before its tool results")
        if any(block["type"] == "text" and not block["text"] for block in blocks):
            found.append(f"messages[{at}]: has an empty text, which is refused")
        asked = [block["id"] for block in blocks if block["type"] == "tool_use"]
    return found + [f"messages: {asked} are not answered"] * bool(asked)


# ── Schemas ─── what OpenAI's strict mode and Anthropic's output format take

BASIC = {"type", "title", "description", "enum", "const", "anyOf", "$ref", "$defs"}
BASIC |= {"properties", "required", "additionalProperties", "items", "format"}
STRICT = BASIC | {"pattern", "multipleOf", "minimum", "maximum", "exclusiveMinimum"}
STRICT |= {"exclusiveMaximum", "minItems", "maxItems"}
FORMATS = {"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid"}


def _nodes(schema: Any) -> Iterable[dict[str, Any]]:
    """The schema and each schema in it."""
    if isinstance(schema, dict):
        yield schema
        for key in ("properties", "$defs"):
            for inner in schema.get(key, {}).values():
                yield from _nodes(inner)
        for key in ("items", "additionalProperties"):
            yield from _nodes(schema.get(key))
        for key in ("anyOf", "allOf", "oneOf", "prefixItems"):
            for inner in schema.get(key, []):
                yield from _nodes(inner)


def _closed_problems(node: Mapping[str, Any]) -> list[str]:
    if node.get("type") != "object" or node.get("additionalProperties") is False:
        return []
    return [f"{node}: an object must have additionalProperties: false"]


def _reference_problems(node: Mapping[str, Any], root: Any) -> list[str]:
    """A reference stands alone, and leads somewhere."""
    if "$ref" not in node:
        return []
    found = [f"{node}: a $ref stands alone"] * bool(set(node) - {"$ref", "$defs"})
    target = root
    for step in node["$ref"].split("/")[1:]:
        target = target.get(step) if isinstance(target, dict) else None
    return found + [f"{node}: leads nowhere"] * (target is None)


def strict_problems(schema: Any) -> list[str]:
    """What OpenAI's strict mode has against this schema."""
    found = [] if schema.get("type") == "object" else [f"{schema}: the root is no object"]
    for node in _nodes(schema):
        found += [f"{node}: {key} is not supported" for key in node if key not in STRICT]
        found += _closed_problems(node) + _reference_problems(node, schema)
        if node.get("type") == "object":
            missing = set(node.get("properties", {})) ^ set(node.get("required", []))
            found += [f"{node}: {sorted(missing)} must be required"] * bool(missing)
        if node.get("format", "date") not in FORMATS:
            found.append(f"{node}: the format is not supported")
        if node.get("type") == "array" and not node.get("items"):
            found.append(f"{node}: items must have a type")
        if "type" not in node and not node.keys() & {"anyOf", "$ref", "enum", "const"}:
            found.append(f"{node}: has no type")
    return found


def anthropic_schema_problems(schema: Any) -> list[str]:
    """What Anthropic's output format has against this schema."""
    found = list[str]()
    for node in _nodes(schema):
        known = BASIC | {"allOf", "minItems"}
        found += [f"{node}: {key} is not supported" for key in node if key not in known]
        found += _closed_problems(node) + _reference_problems(node, schema)
        found += [f"{node}: minItems is 0 or 1"] * (node.get("minItems", 0) not in (0, 1))
        if node.get("format", "date") not in FORMATS | {"uri"}:
            found.append(f"{node}: the format is not supported")
    return found
