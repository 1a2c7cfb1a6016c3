"""Program of thought: what a program may and may not do, and how often a model is asked."""

import asyncio
import contextlib
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import trio
from server import until
from test_examples import ROOT, loaded, needs_local, printed

from ember import SetupError

NAME = "22_program_of_thought"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="programs run on Linux only")


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The example, with a second for each program."""
    module = loaded(NAME)
    monkeypatch.setattr(module, "LIMITS", (1, *module.LIMITS[1:]))
    return module


def files(folder: Path) -> list[str]:
    """What is in a folder."""
    return sorted(path.name for path in folder.iterdir())


def is_running(program: Path) -> bool:
    """Whether a process in /proc runs a program; one that has ended has no command any more."""
    try:
        return b"RLIMIT_" in (program / "cmdline").read_bytes()
    except OSError:
        return False


def programs(of: int) -> set[Path]:
    """The programs that a process runs."""
    found = set[Path]()
    for path in filter(is_running, Path("/proc").glob("[0-9]*")):
        with contextlib.suppress(OSError):
            if f"PPid:\t{of}\n" in (path / "status").read_text():
                found.add(path)
    return found


# ── A program ───


@pytest.mark.parametrize(
    ("program", "output"),
    [
        ("print(6 * 7)", "42"),
        ("import sys\nprint(1)\nsys.exit()", "1"),
        ("import os\nprint('no end')\nos._exit(0)", "no end"),
        ("import sys\nprint('one')\nprint('two', file=sys.stderr)", "one\ntwo"),
        ("print('dæmon 日本')", "dæmon 日本"),
        ("print('\ud800')", "?"),
        ("if __name__ == '__main__':\n    print('main')", "main"),
        ("print([n for n in range(9) if n in (2, 3)])  # \\d is no escape", "[2, 3]"),
        ("print(1 is 1)", "True"),  # a SyntaxWarning is no part of the answer
        ("from datetime import datetime\nprint(datetime.strptime('3.2.2001', '%d.%m.%Y'))",
         "2001-02-03 00:00:00"),
        ("import random\nprint(len({random.random(), random.Random().random()}))", "2"),
        ("from fractions import Fraction as F\nfrom math import *\nprint(F(1, 3) * comb(4, 2))",
         "2"),
        ("import time, datetime\nprint(time.time() > 1e9, datetime.date.today().year > 2000)",
         "True True"),
        ("print('x' * 3_000)", "x" * 3_000),
    ],
)  # fmt: skip
async def test_a_program_that_ends_well_has_its_output_as_the_answer(
    example: ModuleType, program: str, output: str
) -> None:
    assert await example.run(program) == example.Run(program, ok=True, printed=output)


@pytest.mark.parametrize(
    ("program", "output"),
    [
        ("", "It printed nothing.\nExit status 0"),
        ("print()", "Exit status 0"),
        ("print(", "SyntaxError: '(' was never closed"),
        ("print(1)\0", "null bytes"),
        ("print('before')\nprint(1 / 0)", "before\n"),
        ("def half(n):\n    return n / 0\nhalf(1)", 'File "program", line 2, in half'),
        ("import sys\nsys.exit('no answer')", "no answer\nExit status 1"),
        ("import sys\nprint(5)\nsys.exit(3)", "5\nExit status 3"),
        ("raise SystemExit(2)", "Exit status 2"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("input('your name?')", "EOFError"),
        ("import sys\nsys.stdout.close()\nprint(1)", "closed file"),
        ("import sys\nsys.stdout.close()", "Exit status 0"),
        ("import sys\nsys.stdout = sys.stderr = None\nprint(1)", "Exit status 0"),
        ("import numpy", "No module named 'numpy'"),
        ("import ctypes\nctypes.string_at(0)", "Segmentation fault"),
        ("import os\nos.abort()", "fault"),
        ("x = " + "(" * 1_000, "too many nested parentheses"),
        ("import _thread\n_thread.start_new_thread(print, ())", "can't start new thread"),
        ("from resource import *\nsetrlimit(RLIMIT_CPU, (2, 2))", "not allowed to raise"),
    ],
)
async def test_a_program_that_fails_says_why(
    example: ModuleType, program: str, output: str
) -> None:
    run = await example.run(program)
    assert not run.ok
    assert output in run.printed


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "try:\n    while True: pass\nfinally:\n    while True: pass",
        "from signal import *\ntry: signal(24, SIG_IGN)\nexcept OSError:\n    while True: pass",
    ],
    ids=["loop", "finally", "signal"],
)
async def test_a_program_that_does_not_end_is_ended(example: ModuleType, program: str) -> None:
    run = await example.run(program)
    assert not run.ok
    assert run.printed == "It printed nothing.\nCPU time limit exceeded"


@pytest.mark.parametrize(
    "program",
    [
        "while True: print('again' * 100)",
        "while True:\n    try: print('again' * 100)\n    except BaseException: pass",
        "import os\nwhile True: os.write(2, b'again' * 100_000)",
        "print('x' * 10**8)",
    ],
    ids=["prints", "excepts", "writes", "at once"],
)
async def test_a_program_that_prints_endlessly_is_ended(
    example: ModuleType, program: str
) -> None:
    run = await example.run(program)
    assert not run.ok
    assert "File size limit exceeded" in run.printed
    assert example.LIMITS[2] <= len(run.printed) < example.LIMITS[2] + 100


@pytest.mark.parametrize(
    "program",
    [
        "bytes(10 * 2**30)",
        "held = []\nwhile True: held.append(bytearray(2**24))",
        "import ctypes\nctypes.create_string_buffer(10 * 2**30)",
    ],
    ids=["bytes", "list", "buffer"],
)
async def test_a_program_gets_no_more_memory_than_its_own(
    example: ModuleType, monkeypatch: pytest.MonkeyPatch, program: str
) -> None:
    monkeypatch.setattr(example, "LIMITS", (20, *example.LIMITS[1:]))  # memory is what runs out
    run = await example.run(program)
    assert not run.ok
    assert "MemoryError" in run.printed


REFUSED = {
    "fork": "import os; os.fork()",
    "start a program": "import os; os.execv('/bin/true', ['true'])",
    "spawn a program": "import os; os.posix_spawn('/bin/true', ['true'], {})",
    "sleep": "import time; time.sleep(1e6)",
    "wait for a signal": "import signal; signal.sigwait([signal.SIGINT])",
    "read a file": "print(open('/etc/passwd').read())",
    "read what a process has": "print(open('/proc/self/environ').read())",
    "see a folder": "import os; print(os.listdir('/'))",
    "see a file": "import os; print(os.stat('/etc/passwd'))",
    "write a file": "open('{path}', 'w')",
    "remove a file": "import os; os.remove('{path}')",
    "make a folder": "import os; os.mkdir('{path}.d')",
    "change a file's mode": "import os; os.chmod('{path}', 0o777)",
    "close its output": "import os; os.close(1)",
    "copy its output": "import os; os.dup(1)",
    "make a pipe": "import os; os.pipe()",
    "signal its parent": "import os; os.kill(os.getppid(), 0)",  # 0: were it not refused, no harm
    "signal all": "import os; os.kill(-1, 0)",
    "handle a signal": "import signal; signal.signal(signal.SIGXCPU, signal.SIG_IGN)",
    "block a signal": "import signal; signal.pthread_sigmask(signal.SIG_BLOCK, [24])",
    "become another": "import os; os.setuid(1000)",
    "change its root": "import os; os.chroot('/')",
    "see its limits": "import resource; resource.getrlimit(resource.RLIMIT_CPU)",
    "be nicer": "import os; os.nice(-5)",
    "know its machine": "import os; os.uname()",
}


@pytest.mark.parametrize("program", REFUSED.values(), ids=REFUSED)
async def test_the_kernel_refuses(example: ModuleType, program: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("mine")
    run = await example.run(program.replace("{path}", str(path)))
    assert not run.ok
    assert "PermissionError: [Errno 1]" in run.printed
    assert files(tmp_path) == ["file"]
    assert path.read_text() == "mine"


# The numbers are those of x86-64: socket, io_uring_setup, ptrace, seccomp, clone3, fork as x32.
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the numbers of another machine")
@pytest.mark.parametrize("number", [41, 425, 101, 317, 435, 57 | 0x40000000])
async def test_the_kernel_refuses_calls_by_number(example: ModuleType, number: int) -> None:
    call = f"libc.syscall({number}, 2, 1, 0)"
    program = f"import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\nprint({call}"
    run = await example.run(f"{program}, ctypes.get_errno())")
    assert (run.ok, run.printed) == (True, "-1 1")


CHDIR = """
import ctypes
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
page = libc.mmap(None, ctypes.c_size_t(4096), 7, 0x22, -1, ctypes.c_long(0))
code = bytes([0x53, 0xB8, 12, 0, 0, 0, 0x31, 0xDB, 0xCD, 0x80, 0x5B, 0xC3])  # eax = 12; int 0x80
ctypes.memmove(page, code, len(code))
print(ctypes.CFUNCTYPE(ctypes.c_int)(page)())
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the code is another machine's")
async def test_the_kernel_refuses_the_calls_of_the_32_bit_machine(example: ModuleType) -> None:
    run = await example.run(CHDIR)  # its 12 is chdir, which without a path is error 14
    assert run.printed.endswith(("-1", "Segmentation fault"))  # EPERM; or there are no such calls


@pytest.mark.parametrize("module", ["socket", "_socket", "subprocess", "urllib.request", "os.x"])
async def test_what_is_not_loaded_cannot_be_imported(example: ModuleType, module: str) -> None:
    run = await example.run(f"import {module}")
    assert "ModuleNotFoundError: No module named" in run.printed


async def test_a_program_sees_no_key(
    example: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    run = await example.run("import os\nprint(os.environ)")
    assert run.ok
    assert "sk-secret" not in run.printed


@pytest.mark.parametrize(
    ("what", "value"),
    [("machine", lambda: "a new one"), ("system", lambda: "Windows")],
    ids=["machine", "system"],
)
async def test_where_the_filter_is_not_known_nothing_is_run(
    example: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    what: str, value: Callable[[], str],
) -> None:  # fmt: skip
    monkeypatch.setattr(platform, what, value)
    with pytest.raises(SetupError, match="on Linux with seccomp only"):
        await example.run(f"open('{tmp_path / 'file'}', 'w')")
    assert files(tmp_path) == []


async def test_where_the_kernel_has_no_filter_nothing_is_run(
    example: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    without = example.SANDBOX.replace("prctl(22, 2,", "prctl(22, 99,")
    for line in without.splitlines():
        if "setrlimit" in line:
            without = without.replace(line, "    pass")
    monkeypatch.setattr(example, "SANDBOX", without)
    with pytest.raises(SetupError, match="on Linux with seccomp only"):
        await example.run(f"open('{tmp_path / 'file'}', 'w')")
    assert files(tmp_path) == []


async def test_many_programs_run_side_by_side(example: ModuleType) -> None:
    runs = await asyncio.gather(*(example.run(f"print({n})") for n in range(8)))
    assert [run.printed for run in runs] == [*map(str, range(8))]


def test_a_program_runs_on_trio(example: ModuleType) -> None:
    assert trio.run(example.run, "print(6 * 7)").printed == "42"


async def test_a_run_that_is_cancelled_leaves_no_process(example: ModuleType) -> None:
    before = programs(os.getpid())
    running = asyncio.create_task(example.run("while True: pass"))
    await until(lambda: bool(programs(os.getpid()) - before), seconds=30)
    running.cancel()
    await asyncio.wait([running])
    assert running.cancelled()
    assert programs(os.getpid()) <= before


ENDLESS = f"""
import runpy, trio
run = runpy.run_path({str(ROOT / "examples" / NAME)!r} + ".py")["run"]
run.__globals__["LIMITS"] = 1, *run.__globals__["LIMITS"][1:]
trio.run(run, "while True: pass")
"""


@pytest.fixture
def endless() -> Iterator[subprocess.Popen[bytes]]:
    """A process that runs an endless program."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", ENDLESS], env=environment) as parent:
        yield parent
        parent.kill()


async def test_a_program_ends_when_the_process_that_runs_it_is_killed(
    endless: subprocess.Popen[bytes],
) -> None:
    await until(lambda: bool(programs(endless.pid)), seconds=30)
    [program] = programs(endless.pid)
    endless.kill()
    await until(lambda: not is_running(program), seconds=30)
    assert endless.wait() == -signal.SIGKILL


# ── A model that writes programs ───


def saying(*texts: str) -> tuple[Callable[[str], Awaitable[str]], list[str]]:
    """A function that stands where a model stands and says these; and what it is asked."""
    left, asked = [*texts], list[str]()

    async def ask(prompt: str) -> str:
        asked.append(prompt)
        return left.pop(0)

    return ask, asked


@pytest.mark.parametrize(
    "text",
    [
        "print(6 * 7)",
        "```python\nprint(6 * 7)\n```",
        "Of course!\n\n```py\nprint(6 * 7)\n```\n\nIt prints 42.\n```\n42\n```",
        "```\nprint(6 * 7)",
        "``` \r\n\r\nprint(6 * 7)\r\n```",
    ],
    ids=["bare", "fence", "talk", "no end", "CRLF"],
)
async def test_the_program_is_found_in_what_a_model_says(example: ModuleType, text: str) -> None:
    ask, asked = saying(text)
    run = await example.program_of_thought(ask)("What is 6 times {7}?")
    assert (run.ok, run.printed, run.program.strip()) == (True, "42", "print(6 * 7)")
    [prompt] = asked
    assert "Write a Python program" in prompt
    assert prompt.endswith("Question: What is 6 times {7}?")


async def test_a_failing_program_goes_back_with_its_error(example: ModuleType) -> None:
    ask, asked = saying("print(1 / 0)", "print(6 * seven)", "print(6 * 7)")
    run = await example.program_of_thought(ask)("What is 6 times 7?")
    assert (run.ok, run.printed) == (True, "42")
    first, second, third = asked
    assert "ZeroDivisionError: division by zero" in second
    assert "print(1 / 0)" in second
    assert "NameError: name 'seven' is not defined" in third
    assert "ZeroDivisionError" not in third
    assert all("What is 6 times 7?" in prompt for prompt in (first, second, third))


async def test_after_three_failing_programs_the_last_error_is_the_end(example: ModuleType) -> None:
    ask, asked = saying("print(1 / 0)", "I do not know.", "raise ValueError('three')", "print(4)")
    run = await example.program_of_thought(ask)("What?")
    assert not run.ok
    assert "ValueError: three" in run.printed
    assert len(asked) == 3


@needs_local
def test_it_ends_well_with_the_local_model_whatever_that_writes() -> None:
    lines = printed(NAME).splitlines()
    assert lines[-1] in ("It ended well.", "It failed, and so did those before it.")
    assert len(lines) > 2
