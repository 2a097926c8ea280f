"""A small Hub on the loopback interface. It serves a folder as datasets and models, and accepts commits of models.

Repositories whose names start with `gated` need a login. Writing needs TOKEN, and nobody may write to the repositories
of `somebody-else`. `server.fails` is a part of a path and the status that requests with it get.
"""

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

from huggingface_hub import ModelCard

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_a_token_that_nobody_may_see"


class Handler(BaseHTTPRequestHandler):
    """Answer `/api/datasets/USER/NAME…`, `/datasets/USER/NAME/resolve/REVISION/FILE`, and the same for models.

    The files are in `server.folder / USER / NAME`; those of a branch other than main are in `NAME@BRANCH`. A branch has
    one commit.
    """

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # it would delay each answer by 40 ms, because headers and content are two packets

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def do_POST(self):
        self.content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                self.content += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        self.answer()

    def do_PUT(self):
        self.do_POST()

    def answer(self) -> None:
        self.server.requests.append(f"{self.command} {self.path}")
        parts = unquote(urlparse(self.path).path).strip("/").split("/")
        part, status = self.server.fails
        if part and part in self.path:
            self.send(b'{"error": "on purpose"}', status)
        elif self.command in ("POST", "PUT") and parts[1] != "datasets" and "paths-info" not in parts:
            self.write(parts)
        elif parts[:2] == ["api", "models"] and len(parts) >= 4:
            revision = parts[parts.index("revision") + 1] if "revision" in parts else "main"
            self.api(self.branch(parts[2], parts[3], revision), parts[4:])
        elif parts[:2] == ["api", "datasets"] and len(parts) >= 4:
            marked = [parts[parts.index(word) + 1] for word in ("revision", "tree", "paths-info") if word in parts]
            self.api(self.branch(parts[2], parts[3], (marked or ["main"])[0]), parts[4:])
        elif "resolve" in parts:
            owner = parts.index("resolve") - 2  # datasets/USER/NAME/resolve/…, or USER/NAME/resolve/… of a model
            folder = self.branch(parts[owner], parts[owner + 1], parts[owner + 3])
            self.file(folder.joinpath(*parts[owner + 4 :]), commit_of(folder))
        else:
            self.missing("RepoNotFound")

    def branch(self, owner: str, name: str, revision: str) -> Path:
        """Return the folder of a branch, or of the commit that it stands for."""
        folders = self.server.folder.glob(f"{owner}/{name}@*")
        found = (folder for folder in folders if revision in (folder.name.partition("@")[2], commit_of(folder)))
        whole = name if revision in ("main", COMMIT) else f"{name}@{revision}"
        return next(found, self.server.folder / owner / whole)

    def write(self, parts: list[str]) -> None:
        """Answer huggingface_hub's requests to create a repository or branch, to upload and to commit."""
        body = self.content if parts[0] == "upload" or "commit" in parts else json.loads(self.content or b"{}")
        if parts[0] == "upload":  # large files are uploaded before the commit that names them
            self.server.large[hashlib.sha256(body).hexdigest()] = body
            self.send(b"")
        elif parts == ["api", "validate-yaml"]:
            results = ModelCard(body["content"]).data.eval_results or []
            wrong = [r for r in results if not re.fullmatch(r"([\w-]+/)?[\w.-]+", r.dataset_type, re.ASCII)]
            errors = [{"message": f'"{r.dataset_type}" fails to match the required pattern'} for r in wrong]
            self.send(json.dumps({"errors": errors, "warnings": []}).encode(), 400 if errors else 200)
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.send(b'{"error": "Invalid credentials"}', 401)
        elif "somebody-else" in (*parts, body.get("organization") if isinstance(body, dict) else None):
            self.send(b'{"error": "You have no rights"}', 403)
        elif parts[:2] == ["api", "repos"]:
            folder = self.server.folder / body["organization"] / body["name"]
            status = 409 if folder.is_dir() else 200
            if status == 200:
                folder.mkdir(parents=True)
                self.server.private = body.get("private") or body.get("visibility") == "private"
            self.send(json.dumps({"url": f"{self.server.url}/{body['organization']}/{body['name']}"}).encode(), status)
        elif parts[4:5] == ["branch"]:
            (self.server.folder / parts[2] / f"{parts[3]}@{parts[5]}").mkdir(exist_ok=True)
            self.send(b"{}")
        elif "preupload" in parts:
            files = [
                {"path": f["path"], "shouldIgnore": False}
                | {"uploadMode": "lfs" if f["path"].endswith((".safetensors", ".png")) else "regular"}
                for f in body["files"]
            ]
            self.send(json.dumps({"files": files}).encode())
        elif "batch" in parts:
            action = {"upload": {"href": f"{self.server.url}/upload/file"}}
            objects = [{**f, "actions": action} for f in body["objects"]]
            answer = json.dumps({"transfer": "basic", "objects": objects}).encode()
            self.send(answer, kind="application/vnd.git-lfs+json")
        elif "commit" in parts:
            self.commit(parts, [json.loads(line) for line in body.splitlines() if line.strip()])
        else:
            self.missing("EntryNotFound")

    def commit(self, parts: list[str], lines: list[dict[str, dict]]) -> None:
        folder = self.branch(parts[2], parts[3], parts[5])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                content = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                content = self.server.large[value["oid"]]
            elif line["key"] == "deletedFile":
                (folder / value["path"]).unlink()
                continue
            else:
                continue
            (folder / value["path"]).parent.mkdir(parents=True, exist_ok=True)
            (folder / value["path"]).write_bytes(content)
        self.server.commits.append([line["value"].get("path") for line in lines])
        url = f"{self.server.url}/{parts[2]}/{parts[3]}/commit/{COMMIT}"
        self.send(json.dumps({"success": True, "commitOid": COMMIT, "commitUrl": url, "hookOutput": ""}).encode())

    def api(self, folder: Path, rest: list[str]) -> None:
        if not folder.is_dir():
            self.missing("RevisionNotFound" if "@" in folder.name else "RepoNotFound")
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
            paths = [folder / path for path in json.loads(self.content).get("paths", [])]
            self.send(json.dumps([entry(folder, path) for path in paths if path.exists()]).encode())
        elif not rest or rest[0] == "revision":
            info = {"id": "/".join(folder.parts[-2:]).partition("@")[0], "sha": commit_of(folder)}
            info |= {"private": bool(self.server.private), "gated": False, "tags": []}
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            info["siblings"] = [{"rfilename": str(path.relative_to(folder))} for path in files]
            self.send(json.dumps(info).encode())
        else:
            self.missing("EntryNotFound")

    def file(self, path: Path, commit: str) -> None:
        if not path.is_file():
            self.missing("EntryNotFound")
            return
        content = path.read_bytes()
        first, last, status = 0, len(content) - 1, 200
        if self.headers.get("Range", "").startswith("bytes="):
            start, _, end = self.headers["Range"].removeprefix("bytes=").partition("-")
            first, last, status = int(start), min(int(end or last), last), 206
        headers = {"ETag": f'"{etag(path)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if status == 206:
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        self.send(content[first : last + 1], status, headers)

    def missing(self, code: str) -> None:
        self.send(b"{}", 404, {"X-Error-Code": code})

    def send(
        self, content: bytes, status: int = 200, headers: dict[str, str] | None = None, kind: str = "application/json"
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def commit_of(folder: Path) -> str:
    """Return the commit that a branch stands for; COMMIT for main."""
    branch = folder.name.partition("@")[2]
    return hashlib.sha1(branch.encode()).hexdigest() if branch else COMMIT


def entry(folder: Path, path: Path) -> dict[str, object]:
    """Return one row of a repository's file listing."""
    name = str(path.relative_to(folder))
    if path.is_dir():
        return {"type": "directory", "path": name, "oid": hashlib.sha1(name.encode()).hexdigest(), "size": 0}
    return {"type": "file", "path": name, "oid": etag(path), "size": path.stat().st_size}


def etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


@contextlib.contextmanager
def loopback_hub(folder: Path) -> Iterator[ThreadingHTTPServer]:
    """Serve `folder / USER / NAME` as datasets and models. `url` is the endpoint, `requests` lists all requests."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.folder, server.requests, server.commits, server.large = folder, [], [], {}
    server.fails, server.private = ("", 200), None
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
