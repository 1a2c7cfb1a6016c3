"""Data sets: rows from a file, or a sample of them.

    from ember_accel import load

    rows = load("gsm8k.jsonl", sample=200)  # {"input": "How many…", "expected": "72"}

One home for what is wrong in a line of a file, which the file of an evaluation uses as well.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import contextlib
import csv
import importlib
import io
import json
from collections.abc import Callable, Iterable
from hashlib import sha256
from pathlib import Path
from typing import Any, NoReturn

import ember
from ember import SetupError


class Short(contextlib.ContextDecorator):
    """Within it, what is raised has few frames of Ember's in its traceback."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            ember._shorten(error)


@Short()
def load(path: str | Path, sample: int | None = None, seed: int = 0) -> list[Any]:
    """The rows of a .jsonl, .ndjson, .json, .csv, .tsv or .parquet file: objects, or arrays.

    `sample` takes so many of them, chosen by `seed`: the same on each machine, in their order.
    What is wrong in a line is a SetupError with the file and the number of the line.
    """
    read = _READERS.get(Path(path).suffix.lower())
    if not read:
        raise SetupError(f"load: {path} is of no kind that is read: {', '.join(_READERS)}")
    rows = list(read(path))
    if sample is not None and not (ember._is_count(sample) and sample <= len(rows)):
        what = f"sample={sample!r} of the {len(rows)} rows in {path}. Take 1 to {len(rows)}"
        raise SetupError(f"load: {what}, or leave it out for all")
    if sample is None:
        return rows
    ranked = sorted(range(len(rows)), key=lambda index: digest(f"{seed}:{index}"))
    return [rows[index] for index in sorted(ranked[:sample])]


def digest(text: str) -> str:
    """What stands for a text, the same on each machine."""
    return sha256(text.encode()).hexdigest()


def wrong_line(path: object, line: int, what: object) -> NoReturn:
    """SetupError for a line."""
    raise SetupError(f"{path}:{line}: {what}. Mend this line, or give another file")


def _read(path: Any) -> str:
    """The text of a UTF-8 file, without its byte order mark."""
    try:
        return Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        wrong_line(path, error.object[: error.start].count(b"\n") + 1, f"no UTF-8: {error.reason}")


def json_value(path: Any, line: int, text: str | bytes) -> Any:
    """The object or array that begins in a line."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        what = f"no JSON: {getattr(error, 'msg', error)}"
        wrong_line(path, line - 1 + getattr(error, "lineno", 1), what)
    if type(value) not in {dict, list}:
        wrong_line(path, line, f"{value!r:.80} is no object or array")
    return value


def _json_lines(path: Any) -> list[Any]:
    """The rows of a file with one in a line."""
    lines = enumerate(_read(path).split("\n"), 1)
    return [json_value(path, number, text) for number, text in lines if text.strip()]


def _json_array(path: Any) -> list[Any]:
    """The rows of a file that is one array."""
    rows = json_value(path, 1, _read(path))
    if not ember._is_list(rows):
        wrong_line(path, 1, "no array of rows")
    for number, row in enumerate(rows, 1):
        if type(row) not in {dict, list}:
            raise SetupError(f"load: {path}: row {number}: {row!r:.80} is no object or array")
    return rows


def _table(path: Any, delimiter: str = ",") -> Iterable[Any]:
    """The rows of a file with commas or tabs, by the names in its first line."""
    text = _read(path)
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))  # there is one for all readers
    table = csv.DictReader(io.StringIO(text, ""), delimiter=delimiter, strict=True)
    try:
        names = table.fieldnames or [""]
        if "" in names or len({*names}) < len(names):
            wrong_line(path, 1, f"{names} is no header, which names each column")
        for row in table:
            if None in row or None in row.values():
                what = f"not as many cells as the {len(names)} columns"
                wrong_line(path, table.reader.line_num, what)
            yield row
    except csv.Error as error:
        wrong_line(path, table.reader.line_num, error)


def _parquet(path: Any) -> list[Any]:
    """The rows of a Parquet file."""
    try:
        parquet: Any = importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise SetupError(f"load: {path} needs pyarrow. Install it: pip install pyarrow") from None
    try:
        return list(parquet.read_table(path).to_pylist())
    except FileNotFoundError:
        raise
    except Exception as error:  # noqa: BLE001
        raise SetupError(f"load: {path} is no Parquet file that can be read: {error}") from None


_READERS: dict[str, Callable[[Any], Iterable[Any]]] = {
    ".jsonl": _json_lines, ".ndjson": _json_lines, ".json": _json_array, ".csv": _table,
    ".tsv": lambda path: _table(path, "\t"), ".parquet": _parquet,
}  # fmt: skip
