"""A served explorer: real requests to a real server on the loopback."""

import contextlib
import dataclasses
import socket
import threading
import time

import httpx
import uvicorn

from ovref_pipelines.explore.app import make_app
from ovref_pipelines.explore.library import Library

TOKEN = "a-secret"


@dataclasses.dataclass
class Served:
    url: str
    """With the token."""
    library: Library
    client: httpx.Client
    """Has the token already."""


@contextlib.contextmanager
def served(library, hosts=("127.0.0.1",)):
    """Serves a library for the time of the block."""
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    app = make_app(library, TOKEN, hosts=hosts, port=port)
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    base = f"http://127.0.0.1:{port}"
    try:
        with httpx.Client(base_url=base, timeout=120) as client:
            client.get(f"/?token={TOKEN}")
            yield Served(f"{base}/?token={TOKEN}", library, client)
    finally:
        server.should_exit = True
        thread.join()
        listener.close()
