"""A web service: answers, streams, the best of three answers, and a page of what they took.

You will see answers as JSON, a stream as server-sent events, and on http://localhost:8000/usage
spend, latency and hit rate. A request that could cost too much is refused with status 402, and a
client that leaves cancels the model calls behind its request. Start it by one of these lines, and
ask it by the others; `/best` is asked as `/answer` is. The models below need no key.

    uv run --extra local --with fastapi --with uvicorn python examples/service.py
    uvicorn examples.service:app

    curl --json '{"question": "What is the capital of France?"}' localhost:8000/answer
    curl --json '{"question": "Tell me about the sea."}' -N localhost:8000/stream
"""

import asyncio
import json
import logging
import math
import time
from collections import Counter, defaultdict, deque
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import AsyncExitStack
from html import escape
from itertools import accumulate
from typing import Annotated, Any, NamedTuple

import anyio
import uvicorn
from fastapi import Body, Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse

import ember
from ember import Model, cache, models

ANSWERING = [models.local.using(temperature=t, max_tokens=200) for t in (0, 0.3, 0.6)]
JUDGING = models.local.using(temperature=0, max_tokens=300)
DOLLARS = 0.05  # the most that one request may cost
EVENTS = 500  # how many of the last attempts and hits the page looks at

Question = Annotated[str, Body(embed=True, min_length=1, max_length=20_000)]


# ── The service ───


def create_app(
    answering: Sequence[Model] = ANSWERING, judging: Model = JUDGING, dollars: float = DOLLARS
) -> FastAPI:
    """The service on these models, the first of which answers and streams."""
    app, record = FastAPI(title="Ember"), Record()
    cached = [cache(ttl=3600)(one) for one in answering]
    everyone, decide = ember.ensemble(*cached), ember.judge(cache(ttl=3600)(judging))
    warn = logging.getLogger("uvicorn.error").warning

    async def paying() -> AsyncIterator[AsyncExitStack]:
        """The request's ledger and budget; what it opens is closed when its response is over."""
        with ember.track(record.attempt) as ledger, ember.budget(dollars, on_warn=warn):
            try:
                async with AsyncExitStack() as opened:
                    yield opened
            finally:
                record.hits(ledger.saves)

    @app.post("/answer", dependencies=[Depends(paying)])
    async def answer(question: Question) -> dict[str, Any]:
        reply = await cached[0](question)
        facts = {"model": reply.model, "cached": reply.cached, "usd": reply.cost}
        return {"answer": reply.text, **facts}

    @app.post("/best", dependencies=[Depends(paying)])
    async def best(question: Question) -> dict[str, Any]:
        replies = await everyone(question)
        verdict = await decide(question, replies)
        facts = {"model": verdict.answer.model, "scores": verdict.scores}
        return {"answer": verdict.answer.text, **facts, "reason": verdict.reason}

    @app.post("/stream")
    async def stream(
        question: Question, opened: Annotated[AsyncExitStack, Depends(paying)]
    ) -> StreamingResponse:
        pieces = await opened.enter_async_context(answering[0].stream(question))
        first = await anext(pieces, "")  # what fails before it has a status of its own
        return StreamingResponse(events(first, pieces), media_type="text/event-stream")

    @app.get("/usage")
    async def usage() -> HTMLResponse:
        policy = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'"}
        return HTMLResponse(page(record), headers={**policy, "Cache-Control": "no-store"})

    app.add_exception_handler(ember.EmberError, refusal)
    app.add_exception_handler(RequestValidationError, mistake)
    app.add_middleware(leaving)
    return app


async def events(first: str, pieces: ember.Stream) -> AsyncIterator[str]:
    """Server-sent events: each piece, then `done` or `error`, as JSON, which has no line breaks."""

    def event(name: str, **data: Any) -> str:
        return f"event: {name}\ndata: {json.dumps(data)}\n\n"

    try:
        yield event("piece", text=first)
        async for piece in pieces:
            yield event("piece", text=piece)
        yield event("done", usd=pieces.reply.cost, finish=pieces.reply.finish)
    except ember.EmberError as error:
        yield event("error", error=str(error))


async def refusal(_: Request, error: Exception) -> JSONResponse:
    """What a client is told when a call fails."""
    status = {ember.BudgetExceeded: 402, ember.ReplyError: 502}.get(type(error), 500)
    if isinstance(error, ember.CallError):
        status = 429 if error.status == 429 else 503 if error.transient else 502
    wait = getattr(error, "retry_after", None)
    headers = {} if wait is None else {"Retry-After": str(math.ceil(wait))}
    return JSONResponse({"error": str(error)}, status, headers)


async def mistake(_: Request, error: Any) -> JSONResponse:
    """What a client is told of a wrong request, which is not sent back: JSON may not hold it."""
    return JSONResponse({"error": "; ".join(one["msg"] for one in error.errors())}, 422)


def leaving(app: Any) -> Any:
    """The app, with its work on a request cancelled when the client leaves."""

    async def watched(scope: Any, receive: Any, send: Any) -> None:
        inlet, outlet = anyio.create_memory_object_stream[Any](1)

        async def watch() -> None:
            while (message := await receive())["type"] != "http.disconnect":
                await inlet.send(message)
            group.cancel_scope.cancel()

        with inlet, outlet:
            async with anyio.create_task_group() as group:
                group.start_soon(watch)
                await app(scope, outlet.receive, send)
                group.cancel_scope.cancel()

    return watched


# ── What it took ───


class Event(NamedTuple):
    """An attempt, or a hit of the cache."""

    at: float
    model: str
    outcome: str  # "ok", "hit", "failed" or "cancelled"
    seconds: float
    usd: float


class Record:
    """Sums by model, and the last events: it does not grow with the requests."""

    def __init__(self) -> None:
        self.sums = defaultdict[str, Counter[str]](Counter)
        self.last = deque[Event](maxlen=EVENTS)

    def attempt(self, call: ember.Attempt) -> None:
        """Note an attempt as it ends, which may be later than its request."""
        outcome = call.outcome if call.outcome in {"ok", "cancelled"} else "failed"
        self.note(call.model, outcome, call.seconds, usd=call.cost or 0, uncertain=call.uncertain)

    def hits(self, saves: Iterable[tuple[str, float]]) -> None:
        """Note the hits that a ledger has: a cached model goes by the model's name."""
        for name, usd in saves:
            self.note(name, "hit", 0, saved=usd)

    def note(self, model: str, outcome: str, seconds: float, **dollars: Any) -> None:
        """Note one event."""
        self.sums[model].update({outcome: 1, **dollars})
        self.last.append(Event(time.time(), model, outcome, seconds, dollars.get("usd", 0)))


def figures(sums: Counter[str], last: Iterable[Event]) -> dict[str, str]:
    """What the page says of one model, or of all: sums since the start, latency of late."""
    times = sorted(one.seconds for one in last if one.outcome == "ok")
    p50, p95 = (times[math.ceil(s * len(times)) - 1] if times else math.nan for s in (0.5, 0.95))
    rate = sums["hit"] / ((sums["hit"] + sums["ok"]) or math.nan)
    told = {
        "Requests": f"{sums['ok'] + sums['failed'] + sums['cancelled']:,}",
        "Failed": f"{sums['failed']:,}", "Cancelled": f"{sums['cancelled']:,}",
        "Hits": f"{sums['hit']:,}", "Hit rate": f"{rate:.0%}",
        "p50 latency": f"{p50:.2f} s", "p95 latency": f"{p95:.2f} s",
        "Spend": f"${sums['usd']:.4f}", "Saved": f"${sums['saved']:.4f}",
        "Uncertain": f"${sums['uncertain']:.4f}",
    }  # fmt: skip
    return {name: "n/a" if "nan" in text else text for name, text in told.items()}


def plot(last: Sequence[Event], colours: dict[str, int]) -> str:
    """Latency, hit rate and spend, one below the other over one time, as HTML with SVG."""
    begin, end = last[0].at, last[-1].at
    slowest, most = ceiling(max(e.seconds for e in last)), ceiling(sum(e.usd for e in last))
    xs = [100 * (e.at - begin) / (end - begin or 1) for e in last]
    dots = defaultdict[str, str](str)
    for x, e in zip(xs, last, strict=True):
        kind = f"c{colours[e.model]}" if e.outcome == "ok" else e.outcome
        dots[kind] += f"M{x:.2f} {100 - 100 * e.seconds / slowest:.1f}h0"
    hits = accumulate(e.outcome == "hit" for e in last)
    answers = accumulate(e.outcome in {"hit", "ok"} for e in last)
    rates = [h / (a or 1) for h, a in zip(hits, answers, strict=True)]
    spent = [usd / most for usd in accumulate(e.usd for e in last)]
    panels = {
        "Latency<small>■ failed or cancelled, grey: hits</small>": (f"{slowest:g} s", dots),
        "Hit rate so far": ("100%", {"line": line(xs, rates)}),
        "Spend so far": (f"${most:.6f}".rstrip("0").rstrip("."), {"line": line(xs, spent)}),
    }
    drawn = "".join(
        f'<h2>{title}</h2><div class="plot"><span>{top}</span><span>0</span>'
        '<svg viewBox="0 0 100 100" preserveAspectRatio="none">'
        '<path d="M0 0H100M0 50H100M0 100H100"/>'
        + "".join(f'<path class="{kind}" d="{path}"/>' for kind, path in paths.items())
        + "</svg></div>"
        for title, (top, paths) in panels.items()
    )
    times = (time.strftime("%H:%M:%S UTC", time.gmtime(at)) for at in (begin, end))
    return f'{drawn}<p><span>{"</span><span>".join(times)}</span></p>'


def line(xs: Iterable[float], shares: Iterable[float]) -> str:
    """A path through shares of the height."""
    points = (f"{x:.2f} {100 - 100 * y:.1f}" for x, y in zip(xs, shares, strict=True))
    return f"M{'L'.join(points)}"


def ceiling(value: float) -> float:
    """The top of an axis: the next of 1, 2, 5, 10, 20 and so on, upwards and downwards."""
    unit = 10 ** math.floor(math.log10(value or 1))
    return next(unit * step for step in (1, 2, 5, 10) if unit * step >= value)


def page(record: Record) -> str:
    """Figures, a table by model and the plot, as HTML that needs nothing from elsewhere."""
    last, colours = [*record.last], {name: n % 6 for n, name in enumerate(record.sums)}
    total = figures(sum(record.sums.values(), Counter[str]()), last)
    tiles = [f"<div>{name}<b>{total[name]}</b></div>"
             for name in ("Spend", "Hit rate", "p50 latency", "p95 latency")]  # fmt: skip
    rows = [
        f'<tr><th><i class="c{colour}"></i>{escape(name)}<td>'
        + "<td>".join(figures(record.sums[name], [e for e in last if e.model == name]).values())
        for name, colour in colours.items()
    ]
    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Usage</title>
<meta name="viewport" content="width=device-width"><meta http-equiv="refresh" content="15">
<style>{STYLE}</style></head><body><h1>Usage</h1><section>{"".join(tiles)}</section>
<figure><table><thead><tr><th>Model<th>{"<th>".join(total)}</thead><tbody>{"".join(rows)}</tbody>
<tfoot><tr><th>All<td>{"<td>".join(total.values())}</tfoot></table></figure>
<figure>{plot(last, colours) if last else "Nothing has been asked yet."}</figure></body></html>"""


STYLE = """
:root { color-scheme: light dark; --text: light-dark(#22211e, #e8e8ea);
  --soft: light-dark(#6d6b64, #9a9da6); --line: light-dark(#e5e3dd, #34363c) }
body { max-width: 64rem; margin: auto; padding: 1.5rem; font: 15px/1.5 system-ui, sans-serif;
  background: light-dark(#f7f6f2, #121316); color: var(--text) }
h1 { font-size: 1.4rem; margin: 0 } h2 { font-size: 1rem; margin: 0 0 .6rem }
section { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)) }
section, figure { margin: 1rem 0 } small { font-weight: 400; margin-left: .5em }
section div, figure { background: light-dark(#fff, #1c1e22); border: 1px solid var(--line);
  border-radius: .75rem; padding: 1rem 1.2rem; overflow-x: auto }
section, thead, span, small { color: var(--soft) }
b { display: block; font-size: 1.6rem; line-height: 1.3; color: var(--text) }
table { width: 100%; border-collapse: collapse; white-space: nowrap; text-align: right }
th, td { padding: .4rem 0 .4rem 1rem; font-weight: inherit; font-variant-numeric: tabular-nums }
th:first-child { text-align: left; padding-left: 0 }
tbody tr { border-top: 1px solid var(--line) }
tfoot { border-top: 2px solid var(--line); font-weight: 600 }
i { display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin-right: .6em }
.plot { display: grid; grid: 1fr auto / 4rem 1fr; height: 6rem; margin: 1rem 0 1.6rem }
.plot span { line-height: 0 }
svg { grid-area: 1 / 2 / 3 / 3; width: 100%; height: 100%; overflow: visible }
path { fill: none; stroke: var(--line); vector-effect: non-scaling-stroke }
path[class] { stroke: currentColor; stroke-width: 7; stroke-linecap: round }
path.line { stroke-width: 2; color: #4c83ee; stroke-linejoin: round }
path.failed, path.cancelled { stroke-linecap: square }
p { display: flex; justify-content: space-between; margin: 0 0 0 4rem }
i { background: currentColor } .hit { color: var(--line) }
.failed { color: light-dark(#d0342c, #ff6f66) }
.c0 { color: #4c83ee } .c1 { color: #e08a1e } .c2 { color: #2fa57a } .c3 { color: #b35fd0 }
.c4 { color: #d2587f } .c5 { color: #4aa3c4 } .cancelled { color: var(--soft) }
"""


async def main() -> None:
    await uvicorn.Server(uvicorn.Config(create_app(), port=8000)).serve()


app = create_app()

if __name__ == "__main__":
    asyncio.run(main())
