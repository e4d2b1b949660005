"""A real server on the loopback for the tests that need sockets."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest


@contextmanager
def _running(segmenter: Any, name: str, settings: Any, key: str | None = None) -> Iterator[tuple[str, int, Any]]:
    from cmmasksd.serving.app import create_app
    from cmmasksd.serving.server import make_server

    app = create_app(segmenter, name, settings, key)
    server, listening = make_server(app, settings)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    _until(lambda: server.started)  # one that is told to exit before skips the end of the application
    try:
        yield "127.0.0.1", listening.getsockname()[1], app
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()
        assert not app.state.engine._thread.is_alive()


def _until(condition: Callable[[], object], seconds: float = 120) -> None:
    last = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < last, f"still not true after {seconds} s"
        time.sleep(0.01)


@pytest.fixture(scope="session")
def until() -> Callable:
    """`until(condition)`: wait for what another thread or process does; fails after two minutes."""
    return _until


@pytest.fixture(scope="session")
def running() -> Callable:
    """`with running(segmenter, name, settings, key) as (host, port, app)`: a server that ends in good order."""
    return _running
