"""sync: the blocking twin in scripts, threads, running loops, worker processes and on Dask."""

import asyncio
import concurrent.futures
import contextlib
import functools
import gc
import importlib.util
import inspect
import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest
from conftest import Connect
from server import WIRES, Answer, Server, serving, until

import ember

ROOT = Path(__file__).parents[1]
OPENAI = WIRES["openai"]
DASK = importlib.util.find_spec("dask") and importlib.util.find_spec("distributed")


@ember.sync
async def double(x: int) -> int:
    """Twice x."""
    await anyio.lowlevel.checkpoint()
    return 2 * x


def in_threads(count: int, fn: Callable[[int], Any]) -> list[Any]:
    """What fn(0), fn(1) … give, each in a thread of its own."""
    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        return list(pool.map(fn, range(count)))


# ── Where it is called ───


def test_a_blocking_call_gives_the_result() -> None:
    assert double(4) == double(x=4) == 8


def test_twenty_threads_call_at_one_time() -> None:
    events = [threading.Event() for _ in range(20)]

    @ember.sync
    async def meet(x: int) -> int:
        events[x].set()
        await until(lambda: all(event.is_set() for event in events))
        return x

    assert in_threads(20, meet) == list(range(20))


def test_a_thousand_calls_use_one_thread_and_one_loop() -> None:
    double(1)
    before, homes = threading.active_count(), set[tuple[int, int]]()

    @ember.sync
    async def here(x: int) -> int:
        homes.add((threading.get_ident(), id(asyncio.get_running_loop())))
        return x

    assert [here(x) for x in range(1000)] == list(range(1000))
    assert in_threads(20, lambda x: [here(x) for _ in range(10)]) == [[x] * 10 for x in range(20)]
    assert threading.active_count() <= before
    assert len(homes) == 1
    assert threading.get_ident() not in {thread for thread, _ in homes}


def test_a_thousand_calls_leave_no_task_and_no_memory() -> None:
    tasks = ember.sync(running)
    before = tasks()
    double(1)
    gc.collect()
    blocks = sys.getallocatedblocks()
    for x in range(1000):
        double(x)
    gc.collect()
    assert tasks() == before == 1
    assert sys.getallocatedblocks() - blocks < 500


async def running() -> int:
    """How many tasks the background loop has."""
    await asyncio.sleep(0)
    return len(asyncio.all_tasks())


def test_it_works_in_a_running_loop_as_in_a_notebook(server: Server, connect: Connect) -> None:
    server.play(OPENAI.good("right"))
    ask = ember.sync(connect(OPENAI))

    async def cell() -> list[str]:
        return [ask("hi").text, ask("hi").text]

    for backend in ("asyncio", "trio", "asyncio"):
        assert anyio.run(cell, backend=backend) == ["right", "right"]
    assert server.opened == 1  # one background loop, one connection
    loop = asyncio.new_event_loop()
    assert loop.run_until_complete(cell()) == ["right", "right"]
    loop.close()


def test_it_works_in_a_thread_that_the_background_loop_itself_waits_for() -> None:
    @ember.sync
    async def outer(x: int) -> int:
        return await anyio.to_thread.run_sync(double, x)

    assert outer(4) == 8


def test_called_on_its_own_loops_thread_it_is_refused() -> None:
    @ember.sync
    async def outer(x: int) -> int:
        return double(x)

    with pytest.raises(ember.SetupError, match=r"double|await"):
        outer(4)
    gc.collect()
    assert double(4) == 8


class Desk:
    """Something with a method."""

    def __init__(self, name: str) -> None:
        self.name = name

    @ember.sync
    async def ask(self, text: str = "?") -> str:
        """Ask here."""
        await anyio.lowlevel.checkpoint()
        return f"{self.name}: {text}"

    @staticmethod
    @ember.sync
    async def open(text: str) -> str:
        """It needs no desk."""
        return text

    @classmethod
    @ember.sync
    async def new(cls, name: str) -> "Desk":
        """A new desk."""
        return cls(name)


def test_it_binds_as_a_method() -> None:
    desk = Desk("one")
    assert desk.ask("why?") == desk.ask(text="why?") == Desk.ask(desk, "why?") == "one: why?"
    assert Desk.open("x") == desk.open("x") == "x"
    assert Desk.new("two").ask() == "two: ?"
    assert in_threads(3, lambda x: desk.ask(str(x))) == ["one: 0", "one: 1", "one: 2"]
    assert ember.sync(Clerk().ask)("x") == "x"


class Clerk:
    """Something with an async method."""

    async def ask(self, text: str) -> str:
        """The text."""
        return text


def test_it_looks_like_the_function() -> None:
    async def classify(text: str, *, more: int = 3) -> str:
        """What kind it is."""
        return text * more

    twin = ember.sync(classify)
    assert not inspect.iscoroutinefunction(twin)
    assert inspect.signature(twin) == inspect.signature(classify)
    assert (twin.__name__, twin.__doc__) == ("classify", "What kind it is.")
    assert list(inspect.signature(Desk("x").ask).parameters) == ["text"]


def test_it_takes_partials_models_and_decorated_functions(server: Server, connect: Connect) -> None:
    server.play(OPENAI.good("right"))
    model = connect(OPENAI)
    assert ember.sync(model)("hi", temperature=0).text == "right"
    assert ember.sync(functools.partial(model, "hi"))().text == "right"
    assert ember.sync(ember.retry(ember.batch(size=2)(model)))("hi").text == "right"
    assert ember.sync(ember.graph(a=lambda x: x + 1))(1) == {"a": 2}
    assert ember.sync(ember.parallel)(model, ["a", "b"], limit=1)[1].text == "right"


# ── What comes through ───


def test_errors_come_through_as_they_are() -> None:
    wrong = LookupError("gone")

    @ember.sync
    async def fails() -> None:
        await anyio.lowlevel.checkpoint()
        raise wrong

    with pytest.raises(LookupError) as caught:
        fails()
    assert caught.value is wrong
    assert caught.value.__context__ is None
    frames = [frame.name for frame in traceback.extract_tb(wrong.__traceback__)]
    assert "fails" in frames
    files = [frame.filename for frame in traceback.extract_tb(wrong.__traceback__)]
    assert sum(file == ember.__file__ for file in files) <= 2


EXITS = """
import asyncio, sys
import anyio.lowlevel
import ember

kinds = {"CancelledError": asyncio.CancelledError}
fatal = kinds.get(sys.argv[1]) or getattr(__builtins__, sys.argv[1])

@ember.sync
async def fails() -> None:
    await anyio.lowlevel.checkpoint()
    raise fatal

@ember.sync
async def works() -> str:
    return "works"

try:
    fails()
except BaseException as error:
    print(type(error).__name__, works())
"""


@pytest.mark.parametrize("fatal", ["KeyboardInterrupt", "SystemExit", "CancelledError"])
def test_an_exit_within_a_call_comes_through_and_the_loop_lives(fatal: str) -> None:
    with python(EXITS, fatal) as process:
        try:
            shown, errors = process.communicate(timeout=10)
        finally:
            process.kill()
    assert (shown, errors, process.returncode) == (f"{fatal} works\n", "", 0)


def test_a_wrong_call_is_pythons_own_error() -> None:
    with pytest.raises(TypeError, match=r"double\(\) takes 1 positional argument but 2 were given"):
        double(1, 2)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="shout"):

        @ember.sync  # type: ignore[arg-type]
        def shout(text: str) -> str:
            return text

        shout("x")


def test_the_callers_context_crosses_and_stays_its_own() -> None:
    place: ContextVar[str] = ContextVar("place", default="nowhere")

    @ember.sync
    async def visit() -> str:
        before = place.get()
        place.set("there")
        return before

    place.set("home")
    assert (visit(), visit(), place.get()) == ("home", "home", "home")
    assert in_threads(1, lambda _: visit()) == ["nowhere"]


def test_ledgers_and_budgets_cross(server: Server, connect: Connect) -> None:
    server.play(OPENAI.good())
    ask = ember.sync(connect(OPENAI, price=(1, 1)))
    with ember.track() as ledger, ember.budget(usd=1) as spent:
        ask("a")
        in_threads(1, lambda _: ask("b"))  # a thread begins with no ledger, as with no context
    assert ledger.requests == spent.requests == 1
    assert spent.usd > spent.left > 0
    with ember.budget(usd=1e-9), pytest.raises(ember.BudgetExceeded):
        ask("c")
    assert len(server.requests) == 2


# ── Ctrl-C, and the end of a program ───

HANGING = """
import asyncio, gc, sys, threading
import ember

model = ember.model("openai:gpt-4o", base_url=sys.argv[1], api_key="sk-no-secret")
ended = threading.Event()

@ember.sync
async def ask(text: str) -> str:
    try:
        return (await model(text)).text
    finally:
        ended.set()

async def cell():
    ask("x")

try:
    if sys.argv[2] == "in a script":
        ask("x")
    else:
        loop = asyncio.new_event_loop()
        loop.run_until_complete(cell())
except KeyboardInterrupt:
    assert ended.wait(5)
    if sys.argv[2] != "in a script":
        loop.close()
    print("interrupted", ask("again"))
"""


def python(program: str, *arguments: str) -> "subprocess.Popen[str]":
    """A running interpreter that shows every warning."""
    return subprocess.Popen(
        [sys.executable, "-W", "always", "-c", program, *arguments], text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )


@pytest.mark.parametrize("where", ["in a script", "in a running loop"])
def test_ctrl_c_cancels_the_call_and_the_next_one_works(where: str) -> None:
    with serving(OPENAI.good(fault="hang"), OPENAI.good("right")) as server:
        with python(HANGING, f"{server.url}/v1", where) as process:
            anyio.run(until, lambda: len(server.requests) == 1, 20)
            process.send_signal(signal.SIGINT)
            shown, errors = process.communicate(timeout=10)
        assert (shown, errors, process.returncode) == ("interrupted right\n", "", 0)
        anyio.run(until, lambda: server.open == 0)


STUBBORN = """
import anyio
import ember

@ember.sync
async def ask() -> None:
    print("begun", flush=True)
    await anyio.sleep_forever()

ask()
"""


def test_ctrl_c_ends_a_program_at_once() -> None:
    with python(STUBBORN) as process:
        assert process.stdout
        assert process.stdout.readline() == "begun\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=10)
    assert process.returncode in (-signal.SIGINT, 130, 1), errors  # 1: before it was waited for
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert errors.count("Traceback") == 1, errors


ENDING = """
import sys, threading
import ember

model = ember.model("openai:gpt-4o", base_url=sys.argv[1], api_key="sk-no-secret")
ask = ember.sync(model)
print(ask("x").text)
if sys.argv[2] == "while a thread calls":
    threading.Thread(target=ask, args=("y",), daemon=True).start()
"""


@pytest.mark.parametrize("how", ["at rest", "while a thread calls"])
def test_a_program_that_has_used_it_ends_at_once(how: str) -> None:
    with serving(OPENAI.good("right"), OPENAI.good(fault="hang")) as server:
        with python(ENDING, f"{server.url}/v1", how) as process:
            shown, errors = process.communicate(timeout=20)
        assert (shown, process.returncode) == ("right\n", 0)
        assert not errors or how == "while a thread calls", errors  # it may say that it ends
        assert not re.search("destroyed|never awaited|ResourceWarning|was never", errors), errors
        anyio.run(until, lambda: server.open == 0)


# ── Other processes ───


@ember.sync
@ember.cache
async def classify(text: str, url: str) -> str:
    """What a model says about the text; a module's function, as workers need it."""
    model = ember.model("openai:gpt-4o", base_url=url, api_key="sk-no-secret", price=(1, 1))
    return (await model(f"Classify: {text}")).text


@ember.sync
async def decorated(text: str, url: str) -> tuple[str, int, ember.Ledger]:
    """The same with the worker's process and its ledger."""
    with ember.track() as ledger:
        answer = await cached(text, url)
    return answer, os.getpid(), ledger


@ember.cache
async def cached(text: str, url: str) -> str:
    """What a model says about the text."""
    model = ember.model("openai:gpt-4o", base_url=url, api_key="sk-no-secret", price=(1, 1))
    return (await model(f"Classify: {text}")).text


twin = ember.sync(cached)  # of another name than its function


@contextlib.contextmanager
def pool(how: str) -> Iterator[concurrent.futures.ProcessPoolExecutor]:
    """Two worker processes, which are given 30 seconds for all they get."""
    context = multiprocessing.get_context(how)
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as workers:
        try:
            yield workers
        except BaseException:  # a worker that hangs must not hang the tests
            for process in workers._processes.values():
                process.kill()
            raise


@pytest.fixture
def shared(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Server:
    """A server that echoes, and a cache directory for all processes."""
    monkeypatch.setenv("EMBER_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(Path(__file__).parent)]))
    server.play(lambda seen: OPENAI.good(seen.json["messages"][-1]["content"].upper()))
    return server


def check(server: Server, results: list[tuple[str, int, ember.Ledger]]) -> None:
    """Right answers; the sums of all ledgers are what the server saw."""
    assert [answer for answer, _, _ in results] == [f"CLASSIFY: TEXT {x % 5}" for x in range(20)]
    total = ember.Ledger()
    for _, _, ledger in results:
        total.add(ledger)
    assert os.getpid() not in {process for _, process, _ in results}
    assert 5 <= total.requests == len(server.requests) <= 10
    assert total.hits == 20 - total.requests
    assert total.tokens_in == 11 * total.requests
    assert total.cost == pytest.approx(18e-6 * total.requests)
    assert total.saved == pytest.approx(18e-6 * total.hits)


needs_quiet_fork = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # Python 3.12


@needs_quiet_fork
@pytest.mark.parametrize("how", ["spawn", "fork"])
def test_it_runs_on_a_process_pool_with_cache_and_ledger(shared: Server, how: str) -> None:
    assert double(1) == 2  # the background loop of this process is there, and is not forked
    texts, urls = [f"text {x % 5}" for x in range(20)], [f"{shared.url}/v1"] * 20
    with pool(how) as workers:
        check(shared, list(workers.map(decorated, texts, urls, timeout=30)))
        seen = len(shared.requests)
        right = [f"CLASSIFY: {text.upper()}" for text in texts]
        assert list(workers.map(twin, texts, urls, timeout=30)) == right
        assert len(shared.requests) == seen  # from the workers' own cache
        assert list(workers.map(classify, texts, urls, timeout=30)) == right
        assert 5 <= len(shared.requests) - seen <= 10
    assert [twin(*call) for call in zip(texts, urls, strict=True)] == right
    assert len(shared.requests) <= seen + 10


@needs_quiet_fork
def test_errors_come_back_from_a_process_pool(shared: Server) -> None:
    shared.play(Answer(OPENAI.problem("invalid_request_error", "no such thing"), 400))
    with pool("fork") as workers:
        error = workers.submit(classify, "text", f"{shared.url}/v1").exception(20)
    assert isinstance(error, ember.CallError)
    assert error.status == 400
    assert "no such thing" in str(error)


@pytest.mark.parametrize("fn", [double, classify, twin, decorated, Desk("one").ask])
def test_it_survives_pickle(fn: Any) -> None:
    again = pickle.loads(pickle.dumps(fn))
    assert again.__name__ == fn.__name__
    assert inspect.signature(again) == inspect.signature(fn)


def test_what_was_pickled_works() -> None:
    assert pickle.loads(pickle.dumps(double))(4) == 8
    assert pickle.loads(pickle.dumps(Desk("one").ask))("x") == "one: x"


BY_VALUE = """
import sys
import cloudpickle
import ember

async def triple(x: int) -> int:
    return 3 * x

def work(x: int) -> int:
    return ember.sync(ember.retry(triple))(x)

sys.stdout.buffer.write(cloudpickle.dumps([ember.sync(triple), work]))
"""
LOADED = "import pickle, sys; print([fn(7) for fn in pickle.load(sys.stdin.buffer)])"


def test_a_twin_of_a_scripts_own_function_travels_by_value_as_clusters_send_it() -> None:
    pytest.importorskip("cloudpickle")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    sent = subprocess.run([sys.executable, "-c", BY_VALUE], env=environment, capture_output=True)
    assert sent.returncode == 0, sent.stderr
    done = subprocess.run(
        [sys.executable, "-c", LOADED], input=sent.stdout, env=environment, capture_output=True
    )
    assert (done.stdout, done.stderr) == (b"[21, 21]\n", b"")


@needs_quiet_fork
def test_a_forked_process_has_a_loop_of_its_own(server: Server, connect: Connect) -> None:
    server.play(OPENAI.good("right"))
    ask = ember.sync(connect(OPENAI))
    assert ask("parent").text == "right"
    child = os.fork()
    if child == 0:
        ok = False
        with contextlib.suppress(BaseException):
            ok = ask("child").text == "right" and double(4) == 8
        os._exit(0 if ok else 1)
    for _ in range(400):
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        time.sleep(0.025)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert (ended, status) == (child, 0)
    assert ask("parent").text == "right"
    assert len(server.requests) == 3
    assert [seen.connection for seen in server.requests] == [1, 2, 1]


@pytest.mark.skipif(not DASK, reason="dask.distributed is not installed")
@pytest.mark.filterwarnings("ignore")  # Dask's own
def test_it_runs_on_a_dask_cluster_with_cache_and_ledger(shared: Server) -> None:
    import distributed

    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=2, dashboard_address=None
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        texts, urls = [f"text {x % 5}" for x in range(20)], [f"{shared.url}/v1"] * 20
        check(shared, client.gather(client.map(decorated, texts, urls, pure=False)))
        right = [f"CLASSIFY: {text.upper()}" for text in texts]
        assert client.gather(client.map(twin, texts, urls, pure=False)) == right
