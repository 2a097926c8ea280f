"""A Hub on this machine's loopback that serves datasets, and files of models, from a folder: enough for loading.

A repository whose name begins with `gated` asks for a login.
"""

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Handler(BaseHTTPRequestHandler):
    """`/api/datasets/USER/NAME…` and `/datasets/USER/NAME/resolve/REVISION/FILE` over `server.folder / USER / NAME`."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def do_POST(self):
        length = int(self.headers.get("Content-Length", 0))
        self.body = json.loads(self.rfile.read(length) or b"{}")
        self.answer()

    def answer(self) -> None:
        self.server.requests.append(f"{self.command} {self.path}")
        parts = unquote(urlparse(self.path).path).strip("/").split("/")
        if parts[:2] == ["api", "datasets"] and len(parts) >= 4:
            self.api(self.server.folder / parts[2] / parts[3], parts[4:])
        elif "resolve" in parts:
            owner = parts.index("resolve") - 2  # datasets/USER/NAME/resolve/…, or USER/NAME/resolve/… of a model
            folder = self.server.folder / parts[owner] / parts[owner + 1]
            self.file(folder.joinpath(*parts[owner + 4 :]))
        else:
            self.missing("RepoNotFound")

    def api(self, folder: Path, rest: list[str]) -> None:
        if not folder.is_dir():
            self.missing("RepoNotFound")
            return
        if folder.name.startswith("gated"):
            self.send(b"{}", 401, {"X-Error-Code": "GatedRepo"})
            return
        if rest[:1] == ["tree"]:
            root = folder.joinpath(*rest[2:])
            if not root.is_dir():
                self.missing("EntryNotFound")
                return
            recursive = "recursive=true" in urlparse(self.path).query.lower()
            paths = root.rglob("*") if recursive else root.iterdir()
            self.send(json.dumps([entry(folder, path) for path in sorted(paths)]).encode())
        elif rest[:1] == ["paths-info"]:
            paths = [folder / path for path in self.body.get("paths", [])]
            self.send(json.dumps([entry(folder, path) for path in paths if path.exists()]).encode())
        elif not rest or rest[0] == "revision":
            info = {"id": "/".join(folder.parts[-2:]), "sha": COMMIT, "private": False, "gated": False, "tags": []}
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            info["siblings"] = [{"rfilename": str(path.relative_to(folder))} for path in files]
            self.send(json.dumps(info).encode())
        else:
            self.missing("EntryNotFound")

    def file(self, path: Path) -> None:
        if not path.is_file():
            self.missing("EntryNotFound")
            return
        content = path.read_bytes()
        first, last, status = 0, len(content) - 1, 200
        if self.headers.get("Range", "").startswith("bytes="):
            start, _, end = self.headers["Range"].removeprefix("bytes=").partition("-")
            first, last, status = int(start), min(int(end or last), last), 206
        headers = {"ETag": f'"{etag(path)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if status == 206:
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        self.send(content[first : last + 1], status, headers)

    def missing(self, code: str) -> None:
        self.send(b"{}", 404, {"X-Error-Code": code})

    def send(self, content: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def entry(folder: Path, path: Path) -> dict[str, object]:
    """A row of the Hub's listing of a repository."""
    name = str(path.relative_to(folder))
    if path.is_dir():
        return {"type": "directory", "path": name, "oid": hashlib.sha1(name.encode()).hexdigest(), "size": 0}
    return {"type": "file", "path": name, "oid": etag(path), "size": path.stat().st_size}


def etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


@contextlib.contextmanager
def loopback_hub(folder: Path) -> Iterator[ThreadingHTTPServer]:
    """Serve `folder / USER / NAME` as datasets and models; `.url` is the endpoint, `.requests` what was asked."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.folder, server.requests = folder, []
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
