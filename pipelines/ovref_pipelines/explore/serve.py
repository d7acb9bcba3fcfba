"""Runs the explorer: a local server protected by a token in its address."""

import secrets
import socket
import threading
import webbrowser
from collections.abc import Callable
from typing import Any

import uvicorn

from ovref.errors import ConfigError
from ovref_pipelines.explore.app import make_app
from ovref_pipelines.explore.library import Library


def serve(
    place: str,
    build: str | None = None,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    say: Callable[[str], None] = lambda message: None,
    browser: bool = False,
) -> None:
    """Serves the page until it is interrupted.

    Args:
        place: folder or URL of a build's output or of a collection.
        build: see `Library`.
        host: address to listen on; port: 0 selects a free one.
        say: called with the address, which includes the token.
        browser: whether to open a browser.

    Raises:
        OvrefError: `place` cannot be opened.
        ConfigError: the server cannot listen on the address.
    """
    library = Library(place, build)
    token = secrets.token_urlsafe(24)
    listener = listening(host, port)
    port = listener.getsockname()[1]
    everywhere = host in ("0.0.0.0", "::")
    name = socket.gethostname() if everywhere else f"[{host}]" if ":" in host else host
    url = f"http://{name}:{port}/?token={token}"
    say(f"explore: {place} is at {url} (Ctrl-C ends it)")
    app = make_app(library, token, hosts=(name, "localhost"), port=port)
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2)
    server: Any = uvicorn.Server(config)
    if browser:
        threading.Timer(0.3, webbrowser.open, [url]).start()
    with listener:
        server.run(sockets=[listener])


def listening(host: str, port: int) -> socket.socket:
    """A socket bound to this address. Raises ConfigError: it is taken, or is none."""
    # asyncio turns off Nagle's algorithm, which delays each answer by 40 ms, only where the socket
    # says that it is TCP.
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except (OSError, OverflowError) as error:  # the latter for a port above 65535
        listener.close()
        raise ConfigError(f"cannot listen on {host} port {port}: {error}") from error
    return listener
