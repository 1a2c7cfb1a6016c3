"""A whole module with two implementations: Ember's predict, and DSPy's where it is installed.

Both ask one loopback server, which plays recorded answers.
"""

import contextlib
import json
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from server import Answer, Seen, Server, openai_answer
from test_examples import loaded

import ember
from ember_accel.dispatch import Choice, Operation, implementations, on_choice, parity, prefer

# DSPy's own, which are none of ours
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore:.*[Pp]ydantic:UserWarning"),
]
RECORDED = {"How many legs has a cat?": 4, "How many days has a week?": 7, "What is a dozen?": 12}
QUESTION = "How many days has a week?"
WAYS = ["call", "context", "environment"]


def play(seen: Seen) -> Answer:
    """The recorded answer to the question that is asked last."""
    told = json.dumps(seen.json["messages"])
    asked = max(RECORDED, key=told.rfind)
    thought = {"reasoning": "Everybody knows."} if "reasoning" in told else {}
    return Answer(openai_answer(json.dumps({**thought, "answer": RECORDED[asked]})))


@pytest.fixture(params=[False, True], ids=["predict", "chain_of_thought"])
def answer(request: pytest.FixtureRequest, server: Server) -> Operation[Any]:
    """The example's operation, on a server that plays recorded answers."""
    server.play(play)
    end = ember.model("openai:gpt-4o", base_url=f"{server.url}/v1", api_key="k", retries=0)
    return loaded("31_dspy").solver(end, reasoning=request.param)


@pytest.fixture
def no_dspy(monkeypatch: pytest.MonkeyPatch) -> None:
    """DSPy is not installed."""
    monkeypatch.setitem(sys.modules, "dspy", None)


@pytest.fixture
def dspy() -> Any:
    """The real one."""
    return pytest.importorskip("dspy")


@contextlib.contextmanager
def asked_for(name: str, way: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """What a call is given where an implementation is preferred in one of three ways."""
    with prefer(name) if way == "context" else contextlib.nullcontext():
        if way == "environment":
            monkeypatch.setenv("EMBER_ACCEL", name)
        yield {"prefer": name} if way == "call" else {}


async def ran(answer: Operation[Any], **options: Any) -> str:
    """Which implementation answers, rightly."""
    choices = list[Choice]()
    with on_choice(choices.append):
        assert await answer(QUESTION, **options) == 7
    return choices[-1].implementation


# ── Without DSPy ───


async def test_ember_answers_where_nothing_else_is_asked_for(answer: Operation[Any]) -> None:
    assert await ran(answer) == "ember"


@pytest.mark.parametrize("way", WAYS)
async def test_missing_dspy_falls_back_to_ember_with_one_warning(
    answer: Operation[Any], no_dspy: None, way: str, monkeypatch: pytest.MonkeyPatch, server: Server
) -> None:
    with asked_for("dspy", way, monkeypatch) as options:
        with pytest.warns(RuntimeWarning) as caught:
            assert await ran(answer, **options) == "ember"
        assert await ran(answer, **options) == "ember"  # without another warning
    [warning] = map(str, (each.message for each in caught))
    assert warning == (
        f"{answer.name}: 'dspy' cannot run, 'ember' takes its place. "
        "dspy is not installed. Install it, as by `pip install dspy`"
    )
    assert len(server.requests) == 2


@pytest.mark.parametrize("way", WAYS)
async def test_missing_dspy_is_an_error_without_fallback_and_nothing_is_asked(
    answer: Operation[Any], no_dspy: None, way: str, monkeypatch: pytest.MonkeyPatch, server: Server
) -> None:
    with (
        asked_for("dspy", way, monkeypatch) as options,
        pytest.raises(ember.SetupError, match="pip install dspy"),
    ):
        await answer(QUESTION, fallback=False, **options)
    assert server.requests == []


def test_what_is_missing_is_told(answer: Operation[Any], no_dspy: None) -> None:
    told = implementations(answer)[answer.name]
    assert told["ember"] is None
    assert "pip install dspy" in str(told["dspy"])


async def test_parity_without_dspy_is_of_ember_alone(answer: Operation[Any], no_dspy: None) -> None:
    assert dict((await parity(answer, [(QUESTION,)])).gaps) == {}


async def test_a_failing_server_is_embers_own_error(
    answer: Operation[Any], no_dspy: None, server: Server
) -> None:
    server.play(Answer({"error": {"message": "broken"}}, status=500))
    with pytest.raises(ember.CallError) as caught:
        await answer(QUESTION)
    assert caught.value.status == 500
    assert len(server.requests) == 1


# ── With DSPy ───


@pytest.mark.parametrize("way", WAYS)
async def test_dspy_answers_where_it_is_asked_for(
    answer: Operation[Any], dspy: Any, way: str, monkeypatch: pytest.MonkeyPatch, server: Server
) -> None:
    with asked_for("dspy", way, monkeypatch) as options:
        assert await ran(answer, fallback=False, **options) == "dspy"
    [seen] = server.requests
    assert seen.path == "/v1/chat/completions"
    assert "[[ ##" in json.dumps(seen.json["messages"])  # DSPy's own prompt


async def test_a_call_overrides_what_is_preferred_around_it(
    answer: Operation[Any], dspy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EMBER_ACCEL", "dspy")
    assert await ran(answer, prefer="ember") == "ember"
    with prefer("ember"):
        assert await ran(answer) == "ember"
        assert await ran(answer, prefer="dspy") == "dspy"
    assert await ran(answer) == "dspy"


async def test_a_failing_dspy_raises_its_own_error_and_nobody_is_paid_twice(
    answer: Operation[Any], dspy: Any, server: Server
) -> None:
    server.play(Answer({"error": {"message": "broken", "type": "server_error"}}, status=500))
    with pytest.raises(Exception) as caught:
        await answer(QUESTION, prefer="dspy")
    assert not isinstance(caught.value, ember.EmberError | NotImplementedError | ImportError)
    assert caught.value.__notes__[-1] == (
        f"in the implementation 'dspy' of the operation {answer.name!r}"
    )
    assert len(server.requests) == 1


async def test_ember_and_dspy_agree_on_recorded_answers(
    answer: Operation[Any], dspy: Any, server: Server
) -> None:
    compared = await parity(answer, [(question,) for question in RECORDED])
    assert dict(compared.gaps) == {"dspy": [0.0, 0.0, 0.0]}
    assert str(compared).endswith("3 of 3 rows equal, apart by 0 at most")
    assert len(server.requests) == 6


async def test_parity_names_the_rows_in_which_they_differ(
    answer: Operation[Any], dspy: Any, server: Server
) -> None:
    def playing(seen: Seen) -> Answer:
        if QUESTION not in str(seen.json["messages"][-1]) or "[[ ##" not in str(seen.json):
            return play(seen)
        return Answer(openai_answer('{"reasoning": "Nobody knows.", "answer": 8}'))

    server.play(playing)
    compared = await parity(answer, [(question,) for question in RECORDED])
    assert compared.apart("dspy") == [1]


