"""Votes, and the first page of the design: decorators, a fan-out and a vote."""

import enum
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from server import WIRES, Answer, Seen, Server

import ember
from ember import Reply, majority_vote


class Colour(enum.Enum):
    """An answer that is one of few."""

    RED = 1
    BLUE = 2


@dataclass
class City:
    """An answer that cannot be hashed."""

    name: str


@pytest.mark.parametrize(
    ("answers", "winner"),
    [
        (["Paris.", " paris", "Rome"], 0),
        (["Rome", "Paris.", " paris", "PARIS"], 1),
        (["Rome", "Paris"], 0),  # of equally many the first
        (["one", "42", "42.0", 42], 1),
        ([1, 2, 2.0, 3], 1),
        ([True, 1, 1], 1),
        ([Colour.RED, Colour.BLUE, Colour.BLUE], 1),
        ([City("Oslo"), City("Rome"), City("Rome")], 1),
        ([["a"], ["b"], ["b"]], 1),
        ([("a", ["x"]), ("b", []), ("b", [])], 1),
        ([Reply("x", "x"), Reply("Y.", "Y."), Reply("y", "y")], 1),
        ([Reply("", 3), Reply("", 4), Reply("", 4)], 1),
        (["nan", "nan", "inf"], 0),
        ([float("nan"), "nan", "inf"], 0),
        (["9" * 400, "x", "9" * 400], 0),
        ([None, None, "x"], 0),
        (["", "  ", "x"], 0),
    ],
)
def test_the_answer_that_most_agree_on_wins(answers: list[Any], winner: int) -> None:
    for _ in range(3):
        assert majority_vote(iter(answers)) is answers[winner]


def test_a_key_says_which_answers_agree() -> None:
    assert majority_vote(["aa", "b", "c"], key=len) == "b"
    assert majority_vote(["x", {"a": 1}, {"a": 1}], key=lambda answer: answer) == {"a": 1}


def test_a_vote_without_answers_is_refused() -> None:
    with pytest.raises(ember.SetupError, match=r"majority_vote\(\) got no answers"):
        majority_vote([])


FIRST_PAGE = '''
from ember import models, retry, cache, batch, gather, majority_vote

@retry(max_attempts=3)
@cache(ttl=3600)
@batch(size=10)
async def classify(text: str) -> str:
    return (await models.gpt4(f"Classify: {text}")).text

async def main(q):
    answers = await gather(models.gpt4(q), models.claude(q), models.gemini(q))
    best = majority_vote(answers)
    return best, await classify(q)
'''


async def test_the_first_page_of_the_design_runs(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def script(seen: Seen) -> Answer:
        anthropic = seen.path == "/v1/messages"
        text = "Rome" if "gemini" in seen.path else "Paris." if anthropic else " paris"
        return WIRES["anthropic" if anthropic else "openai"].good(text)

    server.play(script)
    for name, path in (("OPENAI", "/v1"), ("ANTHROPIC", ""), ("GEMINI", "/gemini")):
        monkeypatch.setenv(f"{name}_BASE_URL", server.url + path)
        monkeypatch.setenv(f"{name}_API_KEY", "no-secret")
    monkeypatch.setenv("EMBER_CACHE_DIR", str(tmp_path))
    names: dict[str, Any] = {}
    exec(FIRST_PAGE, names)
    best, label = await names["main"]("What is the capital of France?")
    assert (best.text, label) == (" paris", " paris")
    assert len(server.requests) == 4
