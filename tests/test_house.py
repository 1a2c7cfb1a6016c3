"""The laws of the house: how large the files are, how they are built, and in which order."""

import ast
import functools
import io
import re
import subprocess
import symtable
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import ember

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "ember.py").read_text(encoding="utf-8")
ACCEL = {path: path.read_text(encoding="utf-8") for path in ROOT.glob("ember_accel/**/*.py")}

BANNER = re.compile(r"# ── (\d+)\. (\w+) ─── (\S.*)")  # "# ── 4. Providers ─── what stands there"
MACHINE = re.compile(r"(?<![\w.])/(?:root|home|work)\b")
NOT_OURS = {".git", ".hypothesis", ".mypy_cache", ".pytest_cache", ".ruff_cache", ".venv"}
FREE = {
    tokenize.COMMENT, tokenize.DEDENT, tokenize.ENCODING, tokenize.ENDMARKER, tokenize.INDENT,
    tokenize.NEWLINE, tokenize.NL,
}


def tokens(text: str) -> Iterator[tokenize.TokenInfo]:
    """The tokens of a file."""
    return tokenize.generate_tokens(io.StringIO(text).readline)


def code_lines(text: str) -> int:
    """How many lines a token stands on: blanks, comments and docstrings are free."""
    used = {
        line
        for token in tokens(text)
        if token.type not in FREE
        for line in range(token.start[0], token.end[0] + 1)
    }
    for node in ast.walk(ast.parse(text)):
        match node:
            case ast.Expr(value=ast.Constant(value=str()), lineno=first, end_lineno=int(last)):
                used -= set(range(first, last + 1))
            case _:
                pass
    return len(used)


def crowded_lines(text: str) -> list[int]:
    """Lines with a semicolon, or a statement behind something else; `def f(): ...` is none."""
    lines = text.encode().split(b"\n")
    behind = {
        node.lineno
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.stmt) and lines[node.lineno - 1][: node.col_offset].strip()
        if not (isinstance(node, ast.Expr) and ast.unparse(node) == "...")
    }
    return sorted(behind | {token.start[0] for token in tokens(text) if token.string == ";"})


def sections(text: str) -> list[tuple[int, int, str]]:
    """Line, number and name of each section."""
    found = [(n, BANNER.fullmatch(line)) for n, line in enumerate(text.split("\n"), 1)]
    return [(line, int(banner[1]), banner[2]) for line, banner in found if banner]


@functools.cache
def names(text: str) -> list[tuple[ast.stmt, int, set[str], set[str]]]:
    """Each top-level statement: its section (0: the imports), what it defines, what it uses."""
    found, begun = [], sections(text)
    for statement in ast.parse(text).body:
        source = ast.unparse(statement)  # by itself: its annotations are names like all others
        module = symtable.symtable(source, "ember.py", "exec")
        tables = [module]
        for table in tables:
            tables.extend(table.get_children())
        uses = {
            symbol.get_name()
            for table in tables
            for symbol in table.get_symbols()
            if symbol.is_referenced() and (table is module or symbol.is_global())
        }
        defines = {
            symbol.get_name()
            for symbol in module.get_symbols()
            if symbol.is_assigned() and not symbol.is_imported()
        }
        above = [number for line, number, _ in begun if line < statement.lineno]
        found.append((statement, max(above, default=0), defines, uses))
    return found


def forward_references(text: str) -> list[str]:
    """Where a section uses what a later one defines."""
    home = {name: section for _, section, defines, _ in names(text) for name in defines}
    return [
        f"line {statement.lineno}: section {section} uses {name} of section {home[name]}"
        for statement, section, _, uses in names(text)
        for name in sorted(uses & home.keys())
        if home[name] > section
    ]


LIMIT = 3_620  # code lines; the aim is 1,000
ACCEL_LIMIT = 2_570  # of all its files; the aim is 1,800


def test_ember_has_few_enough_code_lines_and_the_readme_says_how_many() -> None:
    assert code_lines(TEXT) <= LIMIT
    assert f"at most {LIMIT:,} lines of code" in (ROOT / "README.md").read_text(encoding="utf8")


def test_no_line_has_more_than_100_columns() -> None:
    lines = enumerate(TEXT.split("\n"), 1)
    assert [number for number, line in lines if len(line) > 100] == []


def test_each_line_has_one_statement() -> None:
    assert crowded_lines(TEXT) == []


def test_no_function_has_more_than_45_lines() -> None:
    sizes = {
        node.name: (node.end_lineno or 0) - node.lineno + 1
        for node in ast.walk(ast.parse(TEXT))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert {name: size for name, size in sizes.items() if size > 45} == {}


def test_ember_accel_has_few_enough_code_lines_and_no_file_over_300() -> None:
    sizes = {path.name: code_lines(text) for path, text in ACCEL.items()}
    assert sum(sizes.values()) <= ACCEL_LIMIT
    assert {name: size for name, size in sizes.items() if size > 300} == {}


def test_banners_have_one_form_and_count_upwards() -> None:
    banners = [line for line in TEXT.split("\n") if line.startswith("# ──")]
    numbers = [number for _, number, _ in sections(TEXT)]
    assert len(banners) == len(numbers) > 0
    assert numbers == sorted(set(numbers))


def test_a_section_uses_only_the_sections_above_it() -> None:
    assert forward_references(TEXT) == []


def test_all_is_sorted_and_names_all_that_is_public() -> None:
    public = {
        name
        for _, section, defines, _ in names(TEXT)
        for name in defines
        if section and not name.startswith("_") and hasattr(ember, name)
    }
    assert ember.__all__ == sorted(public)


def test_import_loads_nothing_that_only_some_calls_need() -> None:
    program = "import sys, ember; print(*{name.split('.')[0] for name in sys.modules})"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=True)
    loaded = set(done.stdout.split())
    later = {
        "diskcache", "httptools", "jax", "numpy", "pydantic", "tenacity", "tqdm", "trio",
        "xllamacpp",
    }
    assert "ember" in loaded
    assert loaded & later == set()


def test_no_file_names_a_path_of_a_machine() -> None:
    found = [
        f"{path}: {hit[0]}"
        for path in ROOT.rglob("*")
        if path.is_file() and path.suffix != ".pyc" and path.name != "uv.lock"
        if NOT_OURS.isdisjoint(path.relative_to(ROOT).parts)
        for hit in MACHINE.finditer(path.read_text(encoding="utf-8", errors="replace"))
    ]
    assert found == []


SMALL_HOUSE = '''
"""Docstring,
of two lines."""
import os  # comment

# ── 1. First ─── below

def first(second: int) -> str:
    """Docstring."""
    return os.sep * second

# ── 2. Second ─── above

def second(third: "third") -> None: ...

class Third:
    second: int = first(1)
'''


def test_the_counter_counts_code_only() -> None:
    assert code_lines(SMALL_HOUSE) == 6


def test_the_law_of_sections_knows_parameters_from_globals() -> None:
    assert forward_references(SMALL_HOUSE) == []


def test_the_law_of_sections_finds_calls_annotations_and_defaults() -> None:
    for text in ("return second(2)", "x: Third = 1", "def inner(x=Third): return x"):
        broken = SMALL_HOUSE.replace("return os.sep * second", text)
        broken = broken.replace("def first(second: int)", "def first(x: int)")
        assert len(forward_references(broken)) == 1, text


def test_crowded_lines_are_found() -> None:
    assert crowded_lines("x = 1; y = 2\nif x: y\nwhile x:\n    y\nelse: z\ndef f(): ...\n") == [
        1, 2, 5,
    ]
