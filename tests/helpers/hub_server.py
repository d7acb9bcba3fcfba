"""A stand-in for the Hugging Face Hub: data set repositories on the loopback, small files only.

It speaks what huggingface_hub asks for when files are uploaded and one is fetched: repositories are
made, files are sent inside of commits or, large ones, before them, and are served by branch or
commit with their ETag.
"""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


class Hub:
    """Repositories: name -> commits, each a mapping from paths to bytes; the last is `main`."""

    def __init__(self):
        self.repositories = {}
        self.fetched = []
        self.large = {}
        """Large files that were sent before their commit, by their SHA-256."""
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self):
                self.do_GET()

            def do_GET(self):
                hub.answer(self, b"")

            def do_POST(self):
                hub.answer(self, self.rfile.read(int(self.headers.get("Content-Length", 0))))

            def do_PUT(self):
                data = read_body(self)
                hub.large[hashlib.sha256(data).hexdigest()] = data
                hub.send(self, 200, {})

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def answer(self, request, body):
        parts = unquote(urlsplit(request.path).path).strip("/").split("/")
        if parts[:3] == ["api", "repos", "create"]:
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else (
                f"me/{asked['name']}"
            )  # fmt: skip
            known = name in self.repositories
            self.repositories.setdefault(name, [("0" * 40, {})])
            url = {"url": f"{self.url}/datasets/{name}"}
            return self.send(request, 409 if known else 200, url)
        if parts[0] == "api" and parts[1] == "validate-yaml":
            return self.send(request, 200, {"errors": [], "warnings": []})
        if parts[:2] == ["api", "datasets"]:
            return self.of_repository(request, "/".join(parts[2:4]), parts[4:], body)
        if parts[-3:] == ["lfs", "objects", "batch"]:
            objects = [
                {**one, "actions": {"upload": {"href": f"{self.url}/large/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]
            return self.send(request, 200, {"transfer": "basic", "objects": objects})
        if parts[0] == "datasets" and parts[3] == "resolve":
            return self.file(request, "/".join(parts[1:3]), parts[4], "/".join(parts[5:]))
        return self.send(request, 404, {"error": f"unknown {request.path}"})

    def of_repository(self, request, name, what, body):
        if name not in self.repositories:
            return self.missing(request, "RepoNotFound")
        commits = self.repositories[name]
        if what[:1] == ["preupload"]:
            files = [
                {"path": one["path"], "uploadMode": mode_of(one["path"]), "shouldIgnore": False}
                for one in json.loads(body)["files"]
            ]
            return self.send(request, 200, {"files": files})
        if what[:1] == ["commit"]:
            tree = dict(commits[-1][1])
            for line in body.splitlines():
                item = json.loads(line)
                if item["key"] == "file":
                    content = base64.b64decode(item["value"]["content"])
                    tree[item["value"]["path"]] = content
                elif item["key"] == "lfsFile":
                    tree[item["value"]["path"]] = self.large[item["value"]["oid"]]
                elif item["key"] == "deletedFile":
                    tree.pop(item["value"]["path"])
            commit = hashlib.sha1(repr(sorted(tree.items())).encode()).hexdigest()
            commits.append((commit, tree))
            url = f"{self.url}/datasets/{name}/commit/{commit}"
            return self.send(request, 200, {"commitOid": commit, "commitUrl": url, "success": True})
        if what[:1] == ["tree"]:
            tree = commits[-1][1]
            items = [
                {"type": "file", "path": path, "size": len(data), "oid": _etag(data)}
                for path, data in tree.items()
            ]
            return self.send(request, 200, items)
        commit, tree = commits[-1]
        siblings = [{"rfilename": path} for path in tree]
        info = {"id": name, "sha": commit, "private": False, "siblings": siblings, "tags": []}
        return self.send(request, 200, info)

    def file(self, request, name, revision, path):
        if name not in self.repositories:
            return self.missing(request, "RepoNotFound")
        commits = dict(self.repositories[name])
        commit = self.repositories[name][-1][0] if revision == "main" else revision
        if commit not in commits:
            return self.missing(request, "RevisionNotFound")
        if path not in commits[commit]:
            return self.missing(request, "EntryNotFound", {"X-Repo-Commit": commit})
        data = commits[commit][path]
        if request.command == "GET":
            self.fetched.append(path)
        heads = {"ETag": f'"{_etag(data)}"', "X-Repo-Commit": commit}
        status, asked = 200, request.headers.get("Range", "")
        if asked.startswith("bytes="):
            first, last = map(int, asked.removeprefix("bytes=").split("-"))
            heads["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            status, data = 206, data[first : last + 1]
        return self.raw(request, status, data, "application/octet-stream", heads)

    def missing(self, request, code, heads=None):
        self.send(request, 404, {"error": code}, {"X-Error-Code": code, **(heads or {})})

    def send(self, request, status, value, heads=None):
        self.raw(request, status, json.dumps(value).encode(), "application/json", heads or {})

    def raw(self, request, status, data, kind, heads):
        request.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": len(data), **heads}.items():
            request.send_header(name, str(value))
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(data)


def read_body(request):
    """The body of a request, with its length or in chunks."""
    if request.headers.get("Transfer-Encoding") != "chunked":
        return request.rfile.read(int(request.headers.get("Content-Length", 0)))
    data = b""
    while size := int(request.rfile.readline(), 16):
        data += request.rfile.read(size)
        request.rfile.readline()
    request.rfile.readline()
    return data


def mode_of(path):
    """How a file is sent, as the Hub decides it."""
    return "lfs" if "pictures-" in path else "regular"


def _etag(data):
    return hashlib.sha1(data).hexdigest()
