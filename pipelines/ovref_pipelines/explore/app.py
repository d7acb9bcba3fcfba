"""The explorer's HTTP interface: static files, JSON, pictures.

Every request needs the token, from the address that `ovref explore` prints or, later, from a
cookie. Requests for another host name are refused, so that other sites cannot reach the server
through DNS rebinding; the page loads nothing from other servers.
"""

import asyncio
import json
import secrets
import threading
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.datastructures import UploadFile
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from ovref.errors import InputError, OvrefError
from ovref.exchange.class_lists import Classes
from ovref.exchange.picture_files import Picture
from ovref.stored_images import UnusableImageError, decode_image
from ovref_inference.collection import store as collections
from ovref_inference.errors import ModelError
from ovref_pipelines.explore import filtered
from ovref_pipelines.explore.classes import coverage, pasted_classes
from ovref_pipelines.explore.library import Library
from ovref_pipelines.explore.pictures import LAYERS, picture
from ovref_pipelines.tool_arguments import METHODS

STATIC = Path(__file__).parent / "static"
FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/app.js": ("app.js", "text/javascript; charset=utf-8"),
    "/views.js": ("views.js", "text/javascript; charset=utf-8"),
    "/style.css": ("style.css", "text/css; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
PAGE = 200
"""Maximum number of rows in one response."""
UPLOAD_BYTES = 40 << 20
TEXT_BYTES = 1 << 20
"""Maximum size of a request body, photographs excepted."""
RESULTS = 24
"""Number of label maps kept for the page to fetch."""


class Guard:
    """Lets through only requests with the token and this server's host name."""

    def __init__(self, app: ASGIApp, token: str, hosts: tuple[str, ...], port: int) -> None:
        self._app, self._token, self._cookie = app, token, f"ovref-{port}"
        self._hosts = {host if port == 80 else f"{host}:{port}" for host in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Request(scope, receive)
        answer = self._refusal(request)
        if answer is not None:
            await answer(scope, receive, send)
            return

        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] += [
                    (b"content-security-policy", POLICY.encode()),
                    (b"x-content-type-options", b"nosniff"),
                    (b"referrer-policy", b"no-referrer"),
                ]
                if "token" in request.query_params:
                    cookie = f"{self._cookie}={self._token}; HttpOnly; SameSite=Strict; Path=/"
                    message["headers"].append((b"set-cookie", cookie.encode()))
            await send(message)

        await self._app(scope, receive, send_with_headers)

    def _refusal(self, request: Request) -> Response | None:
        # The IP address that received the request is not a name that another site could use.
        address, port = request.scope["server"]
        hosts = self._hosts | {f"[{address}]:{port}" if ":" in address else f"{address}:{port}"}
        if request.headers.get("host", "") not in hosts:
            return PlainTextResponse("wrong host name", 403)
        origin = request.headers.get("origin")
        if origin is not None and origin.removeprefix("http://") not in hosts:
            return PlainTextResponse("requests from other sites are refused", 403)
        given = request.query_params.get("token") or request.cookies.get(self._cookie) or ""
        if not secrets.compare_digest(given.encode(), self._token.encode()):
            return PlainTextResponse(
                "open the address that `ovref explore` has printed: it holds a secret token", 401
            )
        return None


def make_app(library: Library, token: str, *, hosts: tuple[str, ...], port: int) -> Starlette:
    """The application, as ASGI.

    Args:
        library: the content to show.
        token: required in every request.
        hosts: names and addresses of this server that requests may use, together with `port`.
    """
    pages = Pages(library)
    routes = [Route(path, _file(name, kind)) for path, (name, kind) in FILES.items()]
    answers: dict[str, Callable[[Request], Any]] = {
        "/api/about": lambda request: library.about() | {"methods": METHODS},
        "/api/progress": lambda request: library.progress(),
        "/api/nouns": pages.nouns,
        "/api/noun": pages.noun,
        "/api/prototypes": lambda request: library.prototypes(request.query_params.get("noun", "")),
        "/api/reference/{id:int}": lambda request: library.reference(request.path_params["id"]),
        "/api/tombstones": pages.tombstones,
        "/api/filtered": lambda request: filtered.filtered(library),
    }
    routes += [Route(path, _json(answer)) for path, answer in answers.items()]
    routes += [
        Route("/api/picture/{id:int}/{layer}", pages.picture),
        Route("/api/filtered/{id:int}/{layer}", pages.filtered_picture),
        Route("/api/result/{name}", pages.result),
        Route("/api/coverage", pages.coverage, methods=["POST"]),
        Route("/api/segment", pages.segment, methods=["POST"]),
        Route("/api/tombstones", pages.mark, methods=["POST"]),
    ]
    guard = Middleware(Guard, token=token, hosts=hosts, port=port)
    handlers: Any = {InputError: _explain, OvrefError: _explain, UnusableImageError: _explain}
    return Starlette(routes=routes, middleware=[guard], exception_handlers=handlers)


class Pages:
    """Handlers of routes that need more than the library has. Everything except waiting for uploads
    runs in threads."""

    def __init__(self, library: Library) -> None:
        self._library = library
        self._results: OrderedDict[str, bytes] = OrderedDict()
        self._photographs: tuple[Any, Any] = (None, None)
        self._models = threading.Lock()
        """Held while models run, because tokenizers must not be used by two threads at once."""
        self._writing = threading.Lock()

    def nouns(self, request: Request) -> Any:
        """A page of the vocabulary."""
        start, count = _page(request)
        query = request.query_params
        return self._library.nouns(query.get("text", ""), query.get("order", ""), start, count)

    def noun(self, request: Request) -> Any:
        """A noun and a page of its references."""
        start, count = _page(request)
        query = request.query_params
        order = query.get("order", "suspicious")
        return self._library.noun(query.get("noun", ""), order, start, count)

    def tombstones(self, request: Request) -> Any:
        """The deleted references."""
        found = collections.read_tombstones(self._library.collection_url)
        rows = list(zip(found["id"], found["reason"], strict=True))[-PAGE:]
        known = self._library.references([number for number, _ in rows])
        return {
            "total": len(found["id"]),
            "references": [
                one | {"reason": reason} for one, (_, reason) in zip(known, rows, strict=True)
            ][::-1],
        }

    async def picture(self, request: Request) -> Response:
        """A picture of a reference."""
        return await self._picture(request, self._library.image)

    async def filtered_picture(self, request: Request) -> Response:
        """A picture of a dropped reference."""
        return await self._picture(request, partial(filtered.dropped_image, self._library))

    async def _picture(self, request: Request, find: Callable[[int], Picture]) -> Response:
        layer, side = request.path_params["layer"], _number(request, "side", 192, 1024)
        if layer not in LAYERS:
            raise InputError(f"layers are {', '.join(LAYERS)}, found {layer}")

        def draw() -> bytes:
            return picture(find(request.path_params["id"]), layer, side)

        return _image(await asyncio.to_thread(draw))

    async def result(self, request: Request) -> Response:
        """A label map computed for the page."""
        found = self._results.get(request.path_params["name"])
        if found is None:
            raise InputError("this result has expired: segment the photograph again")
        return _image(found)

    async def coverage(self, request: Request) -> Response:
        """How well a list of classes is covered."""
        text = (await _body(request, TEXT_BYTES)).decode("utf-8", "replace")
        asked = {name: name in request.query_params for name in ("measured", "clip")}

        def answer() -> Any:
            with self._models:
                return {"classes": coverage(self._library, pasted_classes(text), **asked)}

        return JSONResponse(await asyncio.to_thread(answer))

    async def segment(self, request: Request) -> Response:
        """Segments a photograph by several methods."""
        wanted = f"give a photograph of at most {UPLOAD_BYTES >> 20} MB"
        # The form is streamed to disk, so one that is too large is refused before it is read.
        length = request.headers.get("content-length", "")
        if not length.isdecimal() or int(length) > UPLOAD_BYTES + TEXT_BYTES:
            raise InputError(wanted)
        async with request.form(max_files=1, max_part_size=TEXT_BYTES) as form:
            upload, classes = form.get("photograph"), str(form.get("classes", ""))
            methods = [str(method) for method in form.getlist("method")]
            if not isinstance(upload, UploadFile):
                raise InputError(wanted)
            data = await upload.read()
        if not methods:
            raise InputError("choose at least one method")
        listed = pasted_classes(classes)

        def answer() -> Any:
            with self._models:
                return self._segment(data, listed, methods)

        return JSONResponse(await asyncio.to_thread(answer))

    def _segment(self, data: bytes, classes: Classes, methods: list[str]) -> dict[str, Any]:
        from ovref_pipelines.explore.segmenting import Photographs

        collection = self._library.open().collection
        known, photographs = self._photographs
        if known is not collection:
            photographs = Photographs(collection)
            self._photographs = (collection, photographs)
        found = photographs.segment(decode_image(data), classes, methods)
        for result in found["results"].values():
            if "picture" in result:
                name = secrets.token_hex(8)
                self._results[name] = result["picture"]
                result["picture"] = f"/api/result/{name}"
                while len(self._results) > RESULTS:
                    self._results.popitem(last=False)
            for region in result.get("regions", ()):
                for kind in ("references", "others"):
                    region[kind] = self._library.similar(*region[kind])
        return found

    async def mark(self, request: Request) -> Response:
        """Deletes references or undoes deletions."""
        try:
            tree = json.loads(await _body(request, TEXT_BYTES))
            ids, undo = list(tree["ids"]), bool(tree.get("undo"))
            if any(type(number) is not int for number in ids):  # True and 1.7 are not ids
                raise ValueError(f"ids are whole numbers: {ids[:5]}")
            reason, seen = str(tree.get("reason", "")).strip(), tree["fingerprint"]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(
                f"expected ids, the fingerprint of their collection, and a reason or undo, found "
                f"{error!r}"
            ) from error
        if not ids or not (undo or reason):
            raise InputError("choose references and give a reason")

        def answer() -> Any:
            url = self._library.collection_url
            with self._writing:
                if collections.read_manifest(url).fingerprint != seen:
                    self._library.reopen()
                    raise InputError(
                        "nothing was changed: the collection has been rebuilt meanwhile, and "
                        "the ids of its references have changed. Reload the page"
                    )
                try:
                    if undo:
                        collections.untombstone(url, ids)
                    else:
                        collections.tombstone(url, ids, reason)
                except ValueError as error:
                    raise InputError(str(error)) from error
                self._library.reopen()
            return {"total": self._library.about()["counts"]["tombstones"]}

        return JSONResponse(await asyncio.to_thread(answer))


def _json(answer: Callable[[Request], Any]) -> Callable[[Request], Any]:
    async def respond(request: Request) -> Response:
        return JSONResponse(await asyncio.to_thread(answer, request))

    return respond


def _file(name: str, kind: str) -> Callable[[Request], Any]:
    async def respond(request: Request) -> Response:
        return FileResponse(STATIC / name, media_type=kind, headers={"cache-control": "no-cache"})

    return respond


def _image(data: bytes) -> Response:
    headers = {"cache-control": "private, max-age=3600"}
    return Response(data, media_type="image/webp", headers=headers)


def _explain(request: Request, error: Exception) -> Response:
    code = 503 if isinstance(error, ModelError) else 422
    return JSONResponse({"error": str(error)}, code)


async def _body(request: Request, limit: int) -> bytes:
    data = b""
    async for part in request.stream():
        data += part
        if len(data) > limit:
            raise InputError(f"the request is larger than {limit} bytes")
    return data


def _page(request: Request) -> tuple[int, int]:
    return _number(request, "start", 0, 1 << 40), _number(request, "count", 24, PAGE)


def _number(request: Request, name: str, default: int, most: int) -> int:
    text = request.query_params.get(name, str(default))
    if not text.isdecimal() or not 0 <= int(text) <= most:
        raise InputError(f"{name} must be a number from 0 to {most}, found {text!r}")
    return int(text)
