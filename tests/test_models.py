"""Names for models: the ones that ship, any other, and a model as a value."""

import asyncio
import dataclasses
import json
import pickle
import warnings
from typing import Any

import httpx
import pytest
import respx

from ember import Model, Price, SetupError, model, models, providers

OK = {
    "choices": [{"message": {"content": "ok"}, "finish_reason": "stop"}],  # OpenAI
    "content": [{"type": "text", "text": "ok"}],  # Anthropic
}
FAKE: dict[str, Any] = {
    "transport": httpx.MockTransport(lambda _: httpx.Response(200, json=OK)),
    "api_key": "sk-12345678",
}


def named() -> dict[str, Model]:
    """The models that ship."""
    return {f.name: getattr(models, f.name) for f in dataclasses.fields(models)}


def test_every_model_that_ships_is_served_and_has_a_price() -> None:
    assert list(named()) == [
        "gpt4", "gpt4o", "gpt4o_mini", "gpt5", "gpt5_mini", "claude", "claude_opus",
        "claude_haiku", "gemini", "gemini_flash", "llama", "deepseek", "mistral", "embedding",
        "local",
    ]  # fmt: skip
    assert all(ask.price is not None for ask in named().values())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = [model(f"{ask.provider.name}:{ask.id}").price for ask in named().values()]
    assert again == [ask.price for ask in named().values()]


def test_a_typo_in_a_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="gpt4_mni"):
        models.gpt4_mni  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "provider", "price"),
    [
        ("openai:gpt-4o", "openai", (2.5, 10, 1.25)),
        ("gpt-4o", "openai", (2.5, 10, 1.25)),
        ("gpt-4o-2024-08-06", "openai", (2.5, 10, 1.25)),
        ("claude-haiku-4-5-20251001", "anthropic", (1, 5, 0.1)),
        ("gemini-2.5-flash", "gemini", (0.3, 2.5, 0.03)),
        ("openai:one-of-tomorrow", "openai", None),
        ("openrouter:openai/gpt-4o", "openrouter", None),
        ("ollama:llama3.2:1b", "ollama", None),
        ("azure:gpt-4o", "azure", None),
    ],
)
def test_a_name_is_a_provider_and_an_id_or_a_known_id(
    name: str, provider: str, price: Any
) -> None:
    made = model(name)
    assert made.provider is providers[provider]
    assert made.id == (name if ":" not in name else name.partition(":")[2])
    assert (made.price and made.price[:3]) == price


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("gpt4.1", "gpt-4.1"), ("opnai:gpt-4o", "gpt-4o"), ("claude-opus5", "claude-opus-5"),
     ("openai:", "openai:"), ("", "")],
)  # fmt: skip
async def test_an_unknown_name_is_a_setup_error_with_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(SetupError, match=r"no model .* is known. Did you mean ") as caught:
        await models(name, "hi")
    assert nearest in str(caught.value).partition("Did you mean")[2]


@pytest.mark.parametrize(
    ("name", "successor"),
    [("gpt-4", "gpt-4.1"), ("openai:gpt-4", "gpt-4.1"), ("claude-3-5-sonnet-20241022", "sonnet-5")],
)
async def test_a_retired_id_is_sent_as_given_with_one_warning(name: str, successor: str) -> None:
    with pytest.warns(UserWarning, match=f"has retired .*{successor}.* takes its place") as seen:
        made = model(name, **FAKE)
        await made("hi")
    assert len(seen) == 1
    assert made.id == name.removeprefix("openai:")


@respx.mock
async def test_any_model_can_be_called_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    route = respx.post("https://api.openai.com/v1/chat/completions")
    route.mock(return_value=httpx.Response(200, json=OK))
    monkeypatch.setenv("OPENAI_API_KEY", "sk-12345678")
    assert (await models("openai:gpt-4o", "hi", temperature=0)).text == "ok"
    assert (await models("gpt4", "hi")).text == "ok"
    sent = [json.loads(call.request.content)["model"] for call in route.calls]
    assert sent == ["gpt-4o", "gpt-4.1"]


def test_using_changes_a_copy() -> None:
    base = model("openai:gpt-4o", retries=5, temperature=1, **FAKE)
    other = base.using(retries=0, system="be brief", timeout=3, price=(1, 2))
    assert (base.retries, base.defaults) == (5, {"temperature": 1})
    assert (other.retries, other.timeout, other.price) == (0, 3, Price(1, 2))
    assert other.defaults == {"temperature": 1, "system": "be brief"}
    assert other.api_key is base.api_key


def test_a_models_repr_shows_what_a_call_will_do() -> None:
    shown = repr(model("openai:gpt-4o", api_key="sk-secret-12345", retries=1, timeout=9))
    for part in ("name='openai'", "id='gpt-4o'", "price=Price(input=2.5", "limit=None", "retries=1",
                 "timeout=9", "api_key=***"):  # fmt: skip
        assert part in shown
    assert "secret" not in shown


def test_models_are_values() -> None:
    assert model("gpt-4o", retries=1) == model("openai:gpt-4o", retries=1)
    assert model("gpt-4o") != model("gpt-4o", retries=1)
    assert len({model("gpt-4o"), model("gpt-4o"), model("gpt-4o-mini")}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        models.gpt4.retries = 7  # type: ignore[misc]
    assert repr(pickle.loads(pickle.dumps(models.gpt4))) == repr(models.gpt4)


def test_a_limit_is_a_context_manager_that_each_request_passes_through() -> None:
    most = 0

    async def main() -> None:
        gate, inside = asyncio.Semaphore(2), 0

        async def handle(_: httpx.Request) -> httpx.Response:
            nonlocal inside, most
            inside += 1
            most = max(most, inside)
            await asyncio.sleep(0)
            inside -= 1
            return httpx.Response(200, json=OK)

        transport = httpx.MockTransport(handle)
        ask = model("openai:gpt-4o", api_key="sk-12345678", transport=transport, limit=gate)
        await asyncio.gather(*(ask("hi") for _ in range(20)))

    asyncio.run(main())
    assert most == 2


async def test_a_stream_parameter_is_refused_with_the_way_out() -> None:
    with pytest.raises(SetupError, match=r"stream= is no parameter; use \.stream\(prompt\)"):
        await model("openai:gpt-4o", **FAKE)("hi", stream=True)


def test_a_provider_of_ones_own_is_a_row_with_a_change() -> None:
    openai = providers["openai"]
    row = dataclasses.replace(openai, name="mine", base_url="http://mine/v1", key_env=())
    seen = list[httpx.Request]()

    def handle(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(200, json=OK)

    ask = model("x", provider=row, transport=httpx.MockTransport(handle))
    assert asyncio.run(ask("hi")).text == "ok"  # type: ignore[arg-type]
    assert str(seen[0].url) == "http://mine/v1/chat/completions"
    assert "authorization" not in seen[0].headers
