"""A canary key in every row: it goes to its own host, and appears nowhere else."""

import asyncio
import contextlib
import dataclasses
import logging
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import Connect
from server import WIRES, Answer, Seen, Server, Wire, until

import ember

CANARY = "7c4n4ry7"
ROWS = sorted(ember.providers)
KEYED = sorted(name for name, row in ember.providers.items() if row.key_env)

pytestmark = pytest.mark.usefixtures("no_backoff")


def key(start: str = "sk-") -> str:
    """A key that is found again wherever it shows."""
    return f"{start}{CANARY}-{'x' * 20}"


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error, its causes and contexts (suppressed ones too), and the members of groups."""
    found: list[BaseException | None] = [error]
    for one in found:
        if one is not None:
            members = one.exceptions if isinstance(one, BaseExceptionGroup) else ()
            found += [e for e in (one.__cause__, one.__context__, *members) if e not in found]
            yield one


def rendered(error: BaseException) -> str:
    """All that a log, a debugger or an error tracker shows of an error."""
    text = ""
    for one in chain(error):
        trace = traceback.TracebackException.from_exception(one, capture_locals=True)
        text += "".join(trace.format(chain=True)) + repr(one) + str(one) + repr(one.args)
        said = {"raw"}  # what the server said is data, and is printed by nobody
        text += repr({name: value for name, value in vars(one).items() if name not in said})
    return text


async def caught(call: Callable[[], Any]) -> BaseException:
    """The error of a call; no local of this frame holds a key."""
    try:
        await call()
    except BaseException as error:
        return error
    raise AssertionError("it did not fail")


async def collect(stream: ember.Stream) -> str:
    """The text of a stream."""
    return "".join([piece async for piece in stream])


def assert_hidden(text: str) -> None:
    """The canary is not in the text; if it is, show where."""
    at = text.find(CANARY)
    assert at < 0, f"the key shows: …{text[max(0, at - 300) : at + 80]}…"


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], str]]:
    """Everything logged so far, at DEBUG, by anyone; it is searched once more at the end."""
    caplog.set_level(logging.DEBUG)
    for name in list(logging.root.manager.loggerDict):
        caplog.set_level(logging.NOTSET if name != "asyncio" else logging.DEBUG, logger=name)

    def logged() -> str:
        return "\n".join(
            f"{record!r} {record.getMessage()} {record.args}" for record in caplog.records
        )

    yield logged
    assert_hidden(logged())


@pytest.fixture(autouse=True)
def nothing_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty home, working, cache and temporary directory, searched for the canary at the end."""
    for name in ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "TMPDIR", "EMBER_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.chdir(tmp_path)
    yield
    for path in tmp_path.rglob("*"):
        assert CANARY not in str(path)
        assert not path.is_file() or CANARY.encode() not in path.read_bytes()


def keyed_model(
    name: str, server: Server, monkeypatch: pytest.MonkeyPatch, how: str
) -> ember.Model:
    """A model of a row whose canary key comes by argument, by function or by environment."""
    row = ember.providers[name]
    options: dict[str, Any] = {"timeout": 5, "retries": 1}
    monkeypatch.setenv("WATSONX_PROJECT_ID", "project")
    if how == "environment":
        assert row.url_env
        monkeypatch.setenv(row.key_env[0], key())
        monkeypatch.setenv(row.url_env, server.url)
    else:
        options["base_url"] = server.url
        options["api_key"] = token if how == "function" else key()
    return ember.model(f"{name}:some-model", **options)


async def token() -> tuple[str, float]:
    """A key that is asked for."""
    return key("token-"), 3600


def good(name: str) -> Answer:
    """A complete answer for a row."""
    return WIRES["anthropic" if name == "anthropic" else "openai"].good("right")


# ── Where the key shows ───


@pytest.mark.parametrize("how", ["argument", "environment", "function"])
@pytest.mark.parametrize("name", ROWS)
async def test_a_key_is_sent_and_shows_nowhere(
    server: Server, monkeypatch: pytest.MonkeyPatch, log: Callable[[], str], name: str, how: str
) -> None:
    if how == "environment" and name not in KEYED:
        pytest.skip("this row has no variable")
    if callable(ember.providers[name].base_url) and how == "environment":
        pytest.skip("this row is served in the process")
    asyncio.get_running_loop().set_debug(True)
    model = keyed_model(name, server, monkeypatch, how)
    shown = [
        repr(model),
        str(model),
        f"{model}",
        repr(model.using(temperature=0)),
        repr(ember.providers),
    ]
    shown += [repr(getattr(model, field.name)) for field in dataclasses.fields(model)]
    shown += [str(getattr(model, field.name)) for field in dataclasses.fields(model)]
    with contextlib.suppress(TypeError):
        shown += [repr(dataclasses.asdict(model)), repr(dataclasses.astuple(model))]
    server.play(good(name))
    reply = await model("hi")
    assert any(CANARY in value for value in server.requests[0].headers.values())
    assert CANARY not in server.requests[0].path
    assert CANARY.encode() not in server.requests[0].body
    shown += [repr(reply), str(reply), repr(reply.raw), repr(model), repr(model.stream("hi"))]
    for fault in (Answer(status=401), good(name)):
        server.play(fault)
        stream = model.stream("hi")
        with contextlib.suppress(ember.EmberError):
            async with stream:
                await collect(stream)
        shown += [repr(stream), str(stream)]
        with contextlib.suppress(ember.EmberError):
            await model("hi")
    assert_hidden("\n".join(shown))
    assert_hidden(log())


def echo(status: int, how: str = "json") -> Callable[[Seen], Answer]:
    """An answer that says back all headers of the request."""

    def answer(seen: Seen) -> Answer:
        said = "\n".join(f"{name}: {value}" for name, value in seen.headers.items())
        body: Any = said
        if how == "json":
            body = {"error": {"message": f"Incorrect API key provided: {said}", "code": said}}
        elif how == "fields":
            body = {"error": {"message": dict(seen.headers), "type": said, "param": said}}
        return Answer(body, status)

    return answer


FAULTS: dict[str, Any] = {
    **{f"{status} {how}": echo(status, how) for status in (401, 429, 500, 200)
       for how in ("json", "text", "fields")},
    "reset": lambda wire: wire.good(fault="reset"),
    "closed": lambda wire: wire.good(fault="close", at=0.5),
    "not http": Answer([b"nonsense\r\n\r\n"], head=b"", then="close"),
    "not json": Answer(b"nonsense"),
    "truncated": Answer(b'{"choices": ['),
    "empty object": Answer({}),
    "invalid utf-8": Answer(b'{"choices": "\xff"}'),
    "hang": lambda wire: wire.good(fault="hang"),
    "hang in the body": lambda wire: wire.good(fault="hang", at=0.5),
    "bad gzip": lambda wire: wire.good(headers={"content-encoding": "gzip"}),
    "no choices": Answer({"choices": [], "content": 5}),
}  # fmt: skip


@pytest.mark.parametrize("verb", ["call", "stream", "output"])
@pytest.mark.parametrize("fault", FAULTS)
async def test_no_error_shows_the_key_in_its_chain_or_in_a_local(
    server: Server, connect: Connect, wire: Wire, log: Callable[[], str], fault: str, verb: str
) -> None:
    made = FAULTS[fault]
    server.play(made if isinstance(made, Answer) or made.__name__ == "answer" else made(wire))
    timeout = 0.05 if "hang" in fault else 5
    model = connect(wire, api_key=key(), retries=1, timeout=timeout)

    async def call() -> None:
        if verb == "stream":
            async with model.stream("hi") as stream:
                await collect(stream)
        else:
            await model("hi", **({"output": int} if verb == "output" else {}))

    error = await caught(call)
    assert isinstance(error, ember.EmberError)
    assert_hidden(rendered(error))
    assert_hidden(log())


@pytest.mark.parametrize("name", KEYED)
async def test_no_row_shows_its_key_in_an_error(
    server: Server, monkeypatch: pytest.MonkeyPatch, log: Callable[[], str], name: str
) -> None:
    for how in ("argument", "function"):
        model = keyed_model(name, server, monkeypatch, how)
        for answer in (echo(401), echo(500, "text"), Answer(b"[]"), good(name)):
            server.play(
                answer if answer != good(name) else dataclasses.replace(answer, fault="reset")
            )
            error = await caught(lambda model=model: model("hi"))
            assert isinstance(error, ember.EmberError)
            assert_hidden(rendered(error))
    assert_hidden(log())


async def test_no_connection_error_shows_the_key(
    connect: Connect, wire: Wire, log: Callable[[], str]
) -> None:
    for url in (
        "http://127.0.0.1:1",
        "http://nowhere.invalid",
        "https://127.0.0.1:1",
        "ftp://x",
        "x",
    ):
        model = connect(wire, api_key=key(), base_url=url, retries=0, timeout=5)
        error = await caught(lambda model=model: model("hi"))
        assert isinstance(error, ember.EmberError)
        assert_hidden(rendered(error))


@pytest.mark.parametrize("at", [None, 0.5])
@pytest.mark.parametrize("verb", ["call", "stream"])
@pytest.mark.parametrize("how", ["task.cancel", "asyncio.timeout", "wait_for"])
async def test_no_cancellation_shows_the_key(
    server: Server,
    connect: Connect,
    wire: Wire,
    log: Callable[[], str],
    how: str,
    verb: str,
    at: float | None,
) -> None:
    asyncio.get_running_loop().set_debug(True)
    answer = (
        wire.good(fault="hang", at=at) if verb == "call" else wire.stream("x", fault="hang", at=at)
    )
    server.play(answer)
    model = connect(wire, api_key=key())

    async def call() -> None:
        if verb == "stream":
            async with model.stream("hi") as stream:
                async for _ in stream:
                    pass
        else:
            await model("hi")

    async def bounded() -> None:
        async with asyncio.timeout(0.05):
            await call()

    async def cancelled() -> None:
        task = asyncio.create_task(call())
        await until(lambda: len(server.requests) == 1)
        task.cancel()
        await task

    ways = {"task.cancel": cancelled, "asyncio.timeout": bounded}
    error = await caught(ways.get(how, lambda: asyncio.wait_for(call(), 0.05)))
    assert isinstance(error, asyncio.CancelledError | TimeoutError)
    assert_hidden(rendered(error))
    assert_hidden(log())


@pytest.mark.parametrize(
    "bad", [f"{CANARY}\r\nx-evil: 1", f"{CANARY}ü", f"{CANARY}\x00", f"{CANARY} 🜂", f"{CANARY}\x7f"]
)
@pytest.mark.parametrize("how", ["argument", "environment", "function"])
async def test_a_key_that_no_header_can_hold_is_a_setup_error_without_the_key(
    server: Server,
    connect: Connect,
    wire: Wire,
    monkeypatch: pytest.MonkeyPatch,
    log: Callable[[], str],
    bad: str,
    how: str,
) -> None:
    async def ask() -> str:
        return bad

    if how == "environment" and "\x00" in bad:
        pytest.skip("no variable can hold it")
    if how == "environment":
        row = ember.providers[wire.provider]
        monkeypatch.setenv(row.key_env[0], bad)
        monkeypatch.setenv(row.url_env, server.url)
        model = connect(wire, api_key=None, base_url="")
    else:
        model = connect(wire, api_key=ask if how == "function" else bad)
    error = await caught(lambda: model("hi"))
    assert isinstance(error, ember.SetupError)
    assert wire.provider in str(error)
    assert_hidden(rendered(error))
    assert server.requests == []


@pytest.mark.parametrize("space", ["\n", "\r\n", " ", "\t"])
async def test_white_space_around_a_key_is_not_sent(
    server: Server, connect: Connect, space: str
) -> None:
    server.play(good("openai"))
    await connect(WIRES["openai"], api_key=key() + space)("hi")
    assert server.requests[0].headers["authorization"] == f"Bearer {key()}"


async def test_a_token_function_that_fails_shows_no_token(
    server: Server, connect: Connect, wire: Wire, log: Callable[[], str]
) -> None:
    async def broken() -> str:
        secret = key()
        request = httpx.Request("POST", server.url, headers={"authorization": secret})
        response = httpx.Response(400, request=request)
        response.raise_for_status()
        return secret

    error = await caught(lambda: connect(wire, api_key=broken)("hi"))
    assert isinstance(error, ember.EmberError)
    assert_hidden(rendered(error))


@pytest.mark.parametrize("answer", [None, 5, "", (), ("a", "b"), ("a",), b"bytes", {"token": "x"}])
async def test_a_token_of_the_wrong_kind_is_a_typed_error(
    server: Server, connect: Connect, wire: Wire, answer: Any
) -> None:
    async def odd() -> Any:
        return answer

    error = await caught(lambda: connect(wire, api_key=odd)("hi"))
    assert isinstance(error, ember.EmberError), repr(error)
    assert server.requests == []


# ── Where the key goes ───


def sent(server: Server) -> str:
    """All that the server was sent."""
    return "".join(f"{seen.path} {dict(seen.headers)} {seen.body!r}" for seen in server.requests)


@pytest.mark.parametrize("name", KEYED)
async def test_the_key_of_the_environment_is_not_sent_to_another_host(
    server: Server, monkeypatch: pytest.MonkeyPatch, log: Callable[[], str], name: str
) -> None:
    for variable in ember.providers[name].key_env:
        monkeypatch.setenv(variable, key())
    monkeypatch.setenv("WATSONX_PROJECT_ID", "project")
    server.play(good(name))
    model = ember.model(f"{name}:some-model", base_url=server.url)
    with contextlib.suppress(ember.SetupError):
        await model("hi")
    with contextlib.suppress(ember.EmberError):
        async with model.stream("hi") as stream:
            await collect(stream)
    with contextlib.suppress(ember.EmberError):
        await model.embed(["hi"])
    assert CANARY not in sent(server)


@pytest.mark.parametrize(
    "near",
    [
        "http://api.openai.com/v1",
        "https://api.openai.com.evil.test/v1",
        "https://api.openai.com:444/v1",
        "https://api.openai.com@evil.test/v1",
        "https://evil.test/api.openai.com/v1",
        "https://evil.test#@api.openai.com/v1",
        "https://evil.test?@api.openai.com/v1",
        "https://evil.test\\@api.openai.com/v1",
    ],
)
async def test_a_host_that_looks_alike_is_another_host(
    monkeypatch: pytest.MonkeyPatch, near: str
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key())
    seen: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(200, json=WIRES["openai"].answer("right"))

    model = ember.model("openai:gpt-4o", base_url=near, transport=httpx.MockTransport(answer))
    with contextlib.suppress(ember.EmberError):
        await model("hi")
    assert CANARY not in str([request.headers.raw for request in seen])


@pytest.mark.parametrize(
    "base",
    [
        "https://api.openai.com/v1",
        "https://api.openai.com/v1/",
        "https://api.openai.com:443/v1",
        "https://API.openai.com/v1",
    ],
)
async def test_the_key_of_the_environment_goes_to_its_own_host(
    monkeypatch: pytest.MonkeyPatch, base: str
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key())
    seen: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(200, json=WIRES["openai"].answer("right"))

    transport = httpx.MockTransport(answer)
    await ember.model("openai:gpt-4o", base_url=base, transport=transport)("hi")
    assert seen[0].headers["authorization"] == f"Bearer {key()}"
    assert str(seen[0].url).lower() == "https://api.openai.com/v1/chat/completions"


@pytest.mark.parametrize("name", [name for name in KEYED if ember.providers[name].url_env])
async def test_the_key_of_the_environment_goes_to_the_base_url_of_the_environment(
    server: Server, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    server.play(good(name))
    assert (await keyed_model(name, server, monkeypatch, "environment")("hi")).text == "right"
    assert CANARY in sent(server)


async def test_the_base_url_of_the_environment_given_in_full_is_the_same_host(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key())
    monkeypatch.setenv("OPENAI_BASE_URL", f"{server.url}/v1")
    server.play(good("openai"))
    await ember.model("openai:gpt-4o", base_url=f"{server.url}/other")("hi")
    assert CANARY in sent(server)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_redirect_takes_no_key_along(
    server: Server, connect: Connect, wire: Wire, status: int
) -> None:
    server.play(Answer(b"", status, headers={"location": f"{server.url}/elsewhere"}), wire.good())
    with pytest.raises(ember.CallError):
        await connect(wire, api_key=key())("hi")
    assert len(server.requests) == 1


async def test_a_missing_key_is_a_setup_error_that_names_the_variable(wire: Wire) -> None:
    variable = ember.providers[wire.provider].key_env[0]
    with pytest.raises(ember.SetupError, match=variable):
        await ember.model(f"{wire.provider}:{wire.id}")("hi")


async def test_a_password_in_a_base_url_shows_in_no_error(
    server: Server, connect: Connect, wire: Wire, log: Callable[[], str]
) -> None:
    server.play(Answer(status=500))
    url = server.url.replace("//", f"//user:{CANARY}@") + wire.base
    model = connect(wire, base_url=url, retries=0)
    error = await caught(lambda: model("hi"))
    assert isinstance(error, ember.EmberError)
    assert CANARY not in str(error)


@pytest.mark.parametrize("padding", [*range(520, 600, 7)])
async def test_a_key_that_is_cut_by_the_end_of_a_message_does_not_show(padding: int) -> None:
    key = 'sk-canary-"A1b2C3d4"-A1b2C3d4'

    def echo(request: httpx.Request) -> httpx.Response:
        said = "x" * padding + request.headers["authorization"]
        return httpx.Response(400, json={"error": {"message": said}})

    model = ember.model("openai:gpt-4o", api_key=key, transport=httpx.MockTransport(echo))
    with pytest.raises(ember.CallError) as caught:
        await model("hi")
    assert key[:8] not in str(caught.value)
