"""Program of thought: a model writes a program, and what the program prints is the answer.

You will see the last program, and what it printed. One that fails goes back to the model with its
error, at most twice; what so small a model as the one in this process writes may run, and be wrong.
Words on the command line are asked instead.

A program runs in a process of its own, without the environment, so without your keys. Before its
first line a filter in the kernel (seccomp) refuses all system calls but those by which it computes,
prints and ends: it can open no file and no socket, start no process and no thread, signal no other
process, wait for nothing, and take back no limit, as root neither. The kernel also bounds what it
prints, its memory, and its time on a core, after which it is killed, whatever becomes of this one.

Not protected from: a fault in those few calls of the kernel, or in the processor; many programs at
once that take all cores and all memory for their time (`limit` helps); an answer that is wrong, or
a lie. Run the programs of people who mean harm in a virtual machine. It needs Linux on x86-64 or
ARM64, and elsewhere runs nothing.
"""

import asyncio
import platform
import re
import signal
import sys
import tempfile
from dataclasses import dataclass

import anyio

from ember import Fn, SetupError, models, prompt, refine

LIMITS = 5, 512 << 20, 4_000  # seconds on a core, bytes of memory, bytes of output

# The number of the architecture, then of the system calls: read, write, mmap, mprotect, munmap,
# brk, mremap, madvise, clock_gettime, exit_group, getrandom.
CALLS = {"Linux x86_64": (0xC000003E, 0, 1, 9, 10, 11, 12, 25, 28, 228, 231, 318),
         "Linux aarch64": (0xC00000B7, 63, 64, 222, 226, 215, 214, 216, 233, 113, 94, 278)}
# The rules: load the architecture, refuse if it is another; load the call, allow it if it is one of
# these, else refuse. prctl's 38 is "no new privileges", without which 22, a filter, takes root.
SANDBOX = """
import _strptime, bisect, cmath, copy, ctypes, dataclasses, heapq, itertools, json, operator
import resource, signal, statistics, string, struct, sys, textwrap, traceback, typing
program, (seconds, memory, printed, arch, *calls) = sys.stdin.read(), map(int, sys.argv[1:])
for name, most in dict(CPU=seconds, AS=memory, FSIZE=printed, CORE=0, NOFILE=0, NPROC=0).items():
    resource.setrlimit(getattr(resource, "RLIMIT_" + name), (most, most + (name == "CPU")))
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
rules = [(0x20, 0, 0, 4), (0x15, 0, len(calls) + 1, arch), (0x20, 0, 0, 0)]
rules += [(0x15, len(calls) - index, 0, call) for index, call in enumerate(calls)]
rules += [(0x06, 0, 0, 0x00050001), (0x06, 0, 0, 0x7FFF0000)]
table = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *rule) for rule in rules))
pointer, prctl = struct.pack("HP", len(rules), ctypes.addressof(table)), ctypes.CDLL(None).prctl
(prctl(38, 1, 0, 0, 0) or prctl(22, 2, pointer)) and signal.raise_signal(signal.SIGSYS)
exec(compile(program, "program", "exec"), {"__name__": "__main__"})
"""


@dataclass(frozen=True)
class Run:
    """A program, whether it ended well, and what it printed, its error too."""

    program: str
    ok: bool
    printed: str


async def run(program: str) -> Run:
    """Run a program that nobody has read."""
    calls = CALLS.get(f"{platform.system()} {platform.machine()}", ())
    command = [sys.executable, "-ISuXutf8", "-Wignore", "-c", SANDBOX, *map(str, LIMITS + calls)]
    with tempfile.TemporaryFile() as file:
        done = await anyio.run_process(command, input=f"{program}\n".encode(errors="replace"),
                                       stdout=file, stderr=file, env={}, check=False)
        file.seek(0)
        printed, code = file.read().decode(errors="replace").strip(), done.returncode
    if not calls or code == -signal.SIGSYS:
        raise SetupError("programs run on Linux with seccomp only, on x86-64 or ARM64")
    ok = code == 0 and printed != ""
    end = "" if ok else signal.strsignal(-code) if code < 0 else f"Exit status {code}"
    return Run(program, ok, f"{printed or 'It printed nothing.'}\n{end}".strip())


def program_of_thought(model: Fn[..., object]) -> Fn[[str], Run]:
    """An async function of a question that returns the last run, of at most three."""

    @prompt(model)
    async def write(question: str) -> str:
        """Write a Python program that prints the answer to the question, and nothing else.

        It has no input, no files, no network, and the usual modules for numbers, dates and texts.
        Reply with the program alone.

        Question: {question}
        """

    async def attempt(question: str) -> Run:
        return await run(re.sub(r"(?s)^.*?```\w*\s*\n|```.*", "", await write(question)))

    async def fault(_: str, attempted: Run) -> str | bool:
        return attempted.ok or attempted.printed

    return refine(attempt, fault, max_rounds=2)


async def main() -> None:
    question = " ".join(sys.argv[1:]) or "What is the sum of the squares of the numbers 1 to 100?"
    done = await program_of_thought(models.local.using(temperature=0, max_tokens=120))(question)
    print(done.program.strip(), done.printed, sep="\n\n")
    print("It ended well." if done.ok else "It failed, and so did those before it.")


if __name__ == "__main__":
    asyncio.run(main())
