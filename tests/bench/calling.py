"""What the benchmarks of calls share: the server that stands in for a provider, and measuring.

    python tests/bench/calling.py FOLDER [LATENCY [GAP]]

is that server in Python, for where fakeserver.c cannot be compiled: it takes what that takes, and
does what that does, at a third of the speed. Only the standard library is needed.
"""

import asyncio
import contextlib
import itertools
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, ClassVar

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

Call = Callable[[str], Awaitable[Any]]
JSON = dict[str, Any]

# ── What the server says ───

TEXT = "a word of the answer " * 26
HEAD = (
    "HTTP/1.1 200 OK\r\nDate: Thu, 01 Jan 2026 00:00:00 GMT\r\nServer: fake\r\n"
    "Connection: keep-alive\r\nopenai-organization: org-bench\r\nopenai-processing-ms: 50\r\n"
    "openai-version: 2020-10-01\r\nx-ratelimit-remaining-requests: 9999\r\n"
    "x-ratelimit-remaining-tokens: 999999\r\nx-request-id: req_0123456789abcdef0123\r\n"
)
COMMON = {
    "id": "chatcmpl-0123456789abcdef", "created": 1767225600, "model": "gpt-4.1-2025-04-14",
    "service_tier": "default", "system_fingerprint": "fp_0123456789",
}  # fmt: skip


def whole(body: JSON) -> bytes:
    """The response that holds this JSON."""
    text = json.dumps(body)
    how = f"Content-Type: application/json\r\nContent-Length: {len(text)}\r\n\r\n"
    return f"{HEAD}{how}{text}".encode()


def streamed(events: list[str]) -> bytes:
    """The response that holds these server-sent events, each a chunk of its own."""
    chunks = "".join(f"{len(event):x}\r\n{event}\r\n" for event in events)
    how = "Content-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    return f"{HEAD}{how}{chunks}0\r\n\r\n".encode()


def openai(pieces: int) -> tuple[bytes, bytes]:
    """OpenAI's answer, and as a stream of so many pieces of text."""
    usage = {
        "prompt_tokens": 110, "completion_tokens": pieces, "total_tokens": 110 + pieces,
        "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": 0, "audio_tokens": 0, "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }  # fmt: skip
    said: JSON = {"role": "assistant", "content": TEXT, "refusal": None, "annotations": []}
    choice: JSON = {"index": 0, "message": said, "logprobs": None, "finish_reason": "stop"}

    def event(choices: list[JSON], usage: JSON | None = None) -> str:
        body = {**COMMON, "object": "chat.completion.chunk", "choices": choices, "usage": usage}
        return f"data: {json.dumps(body, separators=(',', ':'))}\n\n"

    def delta(change: JSON, finish: str | None = None) -> str:
        return event([{"index": 0, "delta": change, "logprobs": None, "finish_reason": finish}])

    words = (delta({"content": f"word{n} "}) for n in range(pieces))
    events = [delta({"role": "assistant", "content": ""}), *words, delta({}, "stop")]
    answer = {**COMMON, "object": "chat.completion", "choices": [choice], "usage": usage}
    return whole(answer), streamed([*events, event([], usage), "data: [DONE]\n\n"])


def anthropic(pieces: int) -> tuple[bytes, bytes]:
    """The same by Anthropic."""
    usage = {"input_tokens": 110, "output_tokens": pieces}
    said: JSON = {
        "id": "msg_0123456789abcdef", "type": "message", "role": "assistant", "content": [],
        "model": "claude-sonnet-4-5", "stop_reason": None, "stop_sequence": None, "usage": usage,
    }  # fmt: skip
    text = {"type": "text", "text": ""}
    bodies: list[JSON] = [
        {"type": "message_start", "message": said},
        {"type": "content_block_start", "index": 0, "content_block": text},
    ]
    for n in range(pieces):
        delta = {"type": "text_delta", "text": f"word{n} "}
        bodies.append({"type": "content_block_delta", "index": 0, "delta": delta})
    bodies += [
        {"type": "content_block_stop", "index": 0},
        {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": usage},
        {"type": "message_stop"},
    ]
    answer = {**said, "content": [{**text, "text": TEXT}], "stop_reason": "end_turn"}
    events = [f"event: {body['type']}\ndata: {json.dumps(body)}\n\n" for body in bodies]
    return whole(answer), streamed(events)


def write_answers(folder: Path, pieces: int) -> None:
    """The files that the server sends."""
    for name, (answer, stream) in (("chat", openai(pieces)), ("messages", anthropic(pieces))):
        (folder / name).write_bytes(answer)
        (folder / f"{name}_stream").write_bytes(stream)


# ── Running the server ───


class Control:
    """A server's own routes."""

    def __init__(self, port: int) -> None:
        self.port, self.url = port, f"http://127.0.0.1:{port}/v1"
        self.connection = HTTPConnection("127.0.0.1", port)

    def ask(self, path: str) -> JSON:
        """What a route says."""
        self.connection.request("GET", path)
        answer: JSON = json.loads(self.connection.getresponse().read())
        return answer

    def set(self, latency: float, gap: float = 0) -> None:
        """Set the milliseconds until the first byte, and between two pieces; count anew."""
        self.ask(f"/set?latency={latency}&gap={gap}")

    def counts(self) -> JSON:
        """Since they were set: requests, connections accepted, most in flight, CPU seconds."""
        return self.ask("/counts")


class Server(Control):
    """The server as a process of its own, which ends with this one."""

    def __init__(self, command: list[str], kind: str) -> None:
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
        assert self.process.stdout
        super().__init__(int(self.process.stdout.readline()))
        self.kind = kind


@contextlib.contextmanager
def serving(pieces: int = 1000) -> Iterator[Server]:
    """The server, compiled if there is a compiler."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_answers(folder, pieces)
        command, kind = [sys.executable, __file__], "asyncio: no C compiler was found"
        if compiler := next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None):
            built = str(folder / "fakeserver")
            source = str(HERE / "fakeserver.c")
            if not subprocess.call([compiler, "-O2", "-Wall", "-o", built, source]):
                command, kind = [built], "fakeserver.c"
            else:
                kind = "asyncio: fakeserver.c cannot be compiled here"
        server = Server([*command, name], kind)
        try:
            yield server
        finally:
            server.connection.close()
            server.process.communicate()  # closes its input


# ── The server in Python ───


class Fake(asyncio.Protocol):
    """One connection. What all share is in the class."""

    answers: ClassVar[dict[str, bytes]] = {}
    waits = (0.0, 0.0)  # ms until the first byte, and between two events
    counts: ClassVar = {"requests": 0, "connections": 0, "most": 0}
    before, in_flight = 0.0, 0

    def connection_made(self, transport: Any) -> None:
        self.transport, self.data, self.busy = transport, b"", False
        Fake.counts["connections"] += 1

    def data_received(self, data: bytes) -> None:
        self.data += data
        while not self.busy:
            head, found, rest = self.data.partition(b"\r\n\r\n")
            size = re.search(rb"(?i)\ncontent-length: *(\d+)", head)
            length = int(size[1]) if size else 0
            if not found or len(rest) < length:
                return
            self.data, body, path = rest[length:], rest[:length], head.split(b" ")[1].decode()
            name = "chat" if "/chat/completions" in path else "messages"
            if name == "messages" and "/messages" not in path:
                self.transport.write(Fake.control(path))
                continue
            stream = b'"stream":true' in body or b'"stream": true' in body
            Fake.in_flight, self.busy = Fake.in_flight + 1, True
            Fake.counts["requests"] += 1
            Fake.counts["most"] = max(Fake.counts["most"], Fake.in_flight)
            self.answer(name + "_stream" * stream)

    @staticmethod
    def control(path: str) -> bytes:
        said = {**Fake.counts, "cpu": time.process_time() - Fake.before}
        if path.startswith("/set"):
            found = dict(re.findall(r"(latency|gap)=([\d.]+)", path))
            Fake.waits = float(found.get("latency", 0)), float(found.get("gap", 0))
            Fake.counts = {"requests": 0, "connections": 0, "most": Fake.in_flight}
            Fake.before = time.process_time()
        return whole(said)

    def answer(self, name: str) -> None:
        whole = Fake.answers[name]
        parts = re.findall(rb"(?s).+?\n\n\r\n|.+", whole) if Fake.waits[1] else [whole]
        if Fake.waits[0]:
            asyncio.get_running_loop().call_later(Fake.waits[0] / 1e3, self.go_on, parts)
        else:
            self.go_on(parts)

    def go_on(self, parts: list[bytes]) -> None:
        if not self.transport.is_closing():
            self.transport.write(parts.pop(0))
            if parts:
                asyncio.get_running_loop().call_later(Fake.waits[1] / 1e3, self.go_on, parts)
                return
        Fake.in_flight, self.busy = Fake.in_flight - 1, False
        if self.data:
            self.data_received(b"")


async def serve() -> None:
    """Run the server until standard input ends."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Fake, "127.0.0.1", 0, backlog=1 << 14)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.to_thread(sys.stdin.read)


# ── Measuring ───


def megabytes() -> float:
    """The resident size of this process now; where that cannot be read, the largest so far."""
    with contextlib.suppress(OSError):
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * resource.getpagesize() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


async def run(
    call: Call, prompt: str, at_once: int, number: int, seconds: float = 600
) -> tuple[int, float]:
    """Make so many calls, and none any more after the seconds: how many, and their CPU seconds."""
    turns, started, count = itertools.repeat(None, number), time.perf_counter(), 0

    async def work() -> None:
        nonlocal count
        for _ in turns:
            if not await call(prompt):
                raise AssertionError("an empty answer")
            count += 1
            if time.perf_counter() - started > seconds:
                return

    before = time.process_time()
    await asyncio.gather(*(work() for _ in range(min(at_once, number))))
    return count, time.process_time() - before


def in_a_child(python: str, script: str, *args: Any, env: JSON, seconds: float = 240) -> JSON:
    """What the script in a process of its own prints as its last line, or {"failed": why}."""
    env = {name: v for name, v in os.environ.items() if not name.lower().endswith("_proxy")} | env
    command = [python, script, *map(str, args)]
    try:
        ended = subprocess.run(command, env=env, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"failed": f"not done after {seconds:g} s"}
    lines = (ended.stderr if ended.returncode else ended.stdout).strip().splitlines()
    last = lines[-1] if lines else f"exit status {ended.returncode}"
    answer: JSON = {"failed": last} if ended.returncode else json.loads(last)
    return answer


if __name__ == "__main__":
    for name in ("chat", "chat_stream", "messages", "messages_stream"):
        Fake.answers[name] = Path(sys.argv[1], name).read_bytes()
    latency, gap, *_ = (*map(float, sys.argv[2:]), 0.0, 0.0)
    Fake.waits = latency, gap
    asyncio.run(serve())
