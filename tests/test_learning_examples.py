"""The examples of learning, 33 and 34, as a reader runs them, and on answers that are known."""

import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from server import Answer, Seen, Server, openai_answer
from test_examples import Played, asked, loaded, printed
from test_examples import played as played  # noqa: PLC0414

np = pytest.importorskip("numpy")

Out = pytest.CaptureFixture[str]


def test_33_learn_a_router_buys_quality_with_few_cents(tmp_path: Path) -> None:
    text = printed("33_learn_a_router", str(tmp_path / "curve.svg"))
    table, _, calls = text.partition(f"picture: {tmp_path / 'curve.svg'}\n")
    curve = [[float(each) for each in line.split()] for line in table.splitlines()[1:7]]
    alone = {line.split()[0]: [*map(float, line.split()[1:])] for line in table.splitlines()[7:]}
    assert [row[1] for row in curve] == sorted(row[1] for row in curve)
    assert curve[0][1:] == alone["small"]
    assert any(c < 0.6 * alone["large"][0] and q > alone["large"][1] - 0.02 for _, c, q in curve)
    assert [line.split()[-2] for line in calls.splitlines()] == ["small", "small", "large", "large"]
    picture = ET.parse(tmp_path / "curve.svg").getroot()
    assert {"small", "large"} < {each.text for each in picture.iter()}


def test_33_without_an_argument_draws_into_a_folder_of_its_own() -> None:
    text = printed("33_learn_a_router")
    [picture] = re.findall(r"picture: (.*)\n", text)
    assert Path(picture).read_text(encoding="utf-8").startswith("<svg")
    assert text.replace(picture, "") == printed("33_learn_a_router", picture).replace(picture, "")


async def test_34_learns_whom_to_ask_and_what_to_keep_to_itself(
    played: Played, server: Server, capsys: Out
) -> None:
    pytest.importorskip("jax")
    example = played("34_hybrid_question_answering")
    seen, score = list[Any](), {"Paris": 9, "14": 2}

    def answer(request: Seen) -> Answer:
        body = request.json
        if "response_format" not in body:
            seen.append([message["content"] for message in body["messages"]])
            return Answer(openai_answer("Paris" if "France" in asked(request) else "14"))
        [given] = [mark for text, mark in score.items() if f'answer_1: "{text}"' in asked(request)]
        verdict = {"reason": "so it is", "scores": {"answer_1": given}}
        return Answer(openai_answer(json.dumps(verdict)))

    server.play(answer)
    await example.main()
    before, after, restored, *answers = capsys.readouterr().out.splitlines()
    marks = [float(each) for line in (before, after) for each in re.findall(r"-?\d\.\d+", line)]
    assert marks[2] > marks[0] + 0.3
    assert marks[1] == 0.9
    assert 0.45 < marks[3] < 0.8
    assert restored == "restored: True"
    assert answers == ["Paris", "I do not know."]
    first, second = example.PROMPTS
    assert seen == [
        [first, "What is the capital of France?"], [second, "How much is 5 and 8?"],
    ]  # fmt: skip


async def test_34_answers_without_jax_and_keeps_its_models_out_of_the_gradient() -> None:
    example = loaded("34_hybrid_question_answering")

    async def model(question: str, **options: Any) -> Any:
        return example.HybridQA  # whatever is said has a text

    class Reply:
        text = "Oslo"

    class Verdict:
        scores = (7.0,)

    async def said(*args: Any, **options: Any) -> Any:
        return Reply

    async def judged(*args: Any) -> Any:
        return Verdict

    for threshold, expected in ((0.7, "Oslo"), (0.71, "I do not know.")):
        system = example.HybridQA(np.zeros((64, 2)), threshold, [model, said][::-1], judge=judged)
        assert await system("What is the capital of Norway?") == expected
    learned, rest = example.partition(system)
    assert [learned.models, rest.weights] == [system.models, None]
