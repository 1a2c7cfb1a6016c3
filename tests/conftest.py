"""What many tests share: a clean environment, a scripted server, both wires."""

import gc
import os
import random
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import anyio
import hypothesis  # noqa: F401  # trio gives it its random numbers before they are frozen
import pytest
from server import WIRES, Server, Wire, serving

import ember

# before JAX reads it
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

Connect = Callable[..., ember.Model]
Run = Callable[[Callable[[], Awaitable[Any]]], Any]


def failing(run: Run, call: Callable[[], Awaitable[Any]]) -> Exception:
    """What the call raises, in bounded time."""

    async def main() -> Exception:
        with anyio.fail_after(15), pytest.raises(Exception) as caught:
            await call()
        return caught.value

    return run(main)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first, so that at the end nobody waits for one of them."""
    longest = (
        "test_types.py", "over_a_million_items",
        "test_29_evaluate_runs", "27_storm",
    )  # fmt: skip
    items.sort(key=lambda item: not any(name in item.nodeid for name in longest))


@pytest.fixture(autouse=True, scope="module")
def frozen() -> Iterator[None]:
    """What is there before a file's tests is passed over when garbage is collected in them."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No keys, base URLs or proxies of whoever runs the tests."""
    rows = [
        variable for row in ember.providers.values() for variable in (*row.key_env, row.url_env)
    ]
    others = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "EMBER_ACCEL")
    for name in {*filter(None, rows), *others} & set(map(str.upper, os.environ)):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.fixture
def no_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jitter that is always 0: retries come at once, unless the server names a wait."""
    monkeypatch.setattr(random, "uniform", lambda low, high: 0.0)


@pytest.fixture(params=["fast", "httpcore"])
def transport(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each of the two transports in turn."""
    if request.param == "httpcore":
        monkeypatch.setattr(ember, "_fast", lambda: None)
    elif not ember._fast():
        pytest.skip("httptools is not installed")
    return request.param


@pytest.fixture
def server() -> Iterator[Server]:
    """A scripted server: `server.play(answer, …)`."""
    with serving() as running:
        yield running


@pytest.fixture(params=["openai", "anthropic"])
def wire(request: pytest.FixtureRequest) -> Wire:
    """Each of the two wires."""
    return WIRES[request.param]


@pytest.fixture
def connect(server: Server) -> Connect:
    """`connect(wire, retries=0, …)`: a model that calls the scripted server."""

    def connect(wire: Wire, **options: Any) -> ember.Model:
        options = {
            "api_key": "sk-no-secret",
            "timeout": 20,
            "base_url": server.url + wire.base,
            **options,
        }
        return ember.model(f"{wire.provider}:{wire.id}", **options)

    return connect
