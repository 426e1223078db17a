"""Local hub with the part of the protocol that huggingface_hub needs to download and to publish a commit."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pytest

Files = dict[str, bytes]
TOKEN = "hf_of_the_tests"
LICENSES = ("mit", "other")


class Hub:
    """Repositories as ``{name: {branch: commit}}``, the files of each commit, and the received requests."""

    def __init__(self) -> None:
        self.branches: dict[str, dict[str, str]] = {}
        self.files: dict[str, Files] = {}
        self.gated: set[str] = set()
        self.private: set[str] = set()
        self.storage = ""  # address of a storage for large files, to which hf_xet sends them
        self.messages: list[str] = []
        self.requests: list[str] = []
        self.url = ""

    def commit(self, repository: str, files: Files, branch: str = "main") -> str:
        """Add files to a branch. Return the commit's name."""
        branches = self.branches.setdefault(repository, {})
        whole = {**self.files.get(branches.get(branch, ""), {}), **files}
        commit = hashlib.sha1(repr((repository, branch, sorted(whole.items()))).encode()).hexdigest()
        self.files[commit], branches[branch] = whole, commit
        return commit

    def downloaded(self) -> list[str]:
        """Return the names of the fetched files."""
        return sorted(
            path.split("/resolve/")[1].split("/", 1)[1]
            for path in self.requests
            if path.startswith("GET") and "/resolve/" in path
        )


class Refusal(Exception):
    def __init__(self, status: int, code: str = "", text: str = "") -> None:
        self.status, self.code, self.text = status, code, text


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer()

    def answer(self) -> None:
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        body = (
            self.rfile.read(int(self.headers["Content-Length"]))
            if "Content-Length" in self.headers
            else self.chunks()
        )
        self.hub.requests.append(f"{self.command} {'/'.join(parts)}")
        try:
            content, headers = self.post(parts, body) if self.command == "POST" else self.get(parts)
            self.send_response(200)
        except Refusal as refusal:
            content, headers = (
                refusal.text.encode(),
                {"X-Error-Code": refusal.code, "X-Error-Message": refusal.text},
            )
            self.send_response(refusal.status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def chunks(self) -> bytes:
        """Read a body of unknown length, the form of commits."""
        parts = []
        while self.headers.get("Transfer-Encoding") == "chunked" and (size := int(self.rfile.readline(), 16)):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        return b"".join(parts)

    def get(self, parts: list[str]) -> tuple[bytes, dict[str, str]]:
        if parts[:2] == ["api", "models"]:
            repository, kind, revision = "/".join(parts[2:4]), *(parts[4:6] or ["revision", "main"])
            commit = self.find(repository, revision)
            if kind == "revision":
                siblings = [{"rfilename": path} for path in self.hub.files[commit]]
                private = repository in self.hub.private
                return _json({"id": repository, "sha": commit, "siblings": siblings, "private": private})
            if kind == "xet-write-token":
                return _json({"casUrl": self.hub.storage, "accessToken": "any", "exp": 2**40})
            listing = [
                {"type": "file", "path": path, "size": len(data), "oid": _etag(data)}
                for path, data in self.hub.files[commit].items()
            ]
            return _json(listing)
        if parts[2:3] != ["resolve"]:
            raise Refusal(404)
        repository, revision, path = "/".join(parts[:2]), parts[3], "/".join(parts[4:])
        commit = self.find(repository, revision)
        if path not in self.hub.files[commit]:
            raise Refusal(404, "EntryNotFound")
        data = self.hub.files[commit][path]
        return data, {"ETag": f'"{_etag(data)}"', "X-Repo-Commit": commit}

    def find(self, repository: str, revision: str) -> str:
        if repository not in self.hub.branches or (repository in self.hub.private and not self.may_write()):
            raise Refusal(404, "RepoNotFound")
        if repository in self.hub.gated:
            raise Refusal(403, "GatedRepo", "Access is restricted")
        branches = self.hub.branches[repository]
        commit = branches.get(revision, revision)
        if commit not in self.hub.files:
            raise Refusal(404, "RevisionNotFound")
        return commit

    def may_write(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def post(self, parts: list[str], body: bytes) -> tuple[bytes, dict[str, str]]:
        if parts == ["api", "validate-yaml"]:
            content = json.loads(body)["content"]
            known = any(f"license: {name}\n" in content for name in LICENSES)
            answer = {
                "warnings": [],
                "errors": [] if known else [{"message": '"license" must be one of [mit, other]'}],
            }
            if not known:
                raise Refusal(400, text=json.dumps(answer))
            return _json(answer)
        if not self.may_write():
            raise Refusal(401, text="Invalid username or password.")
        if parts == ["api", "repos", "create"]:
            asked = json.loads(body)
            repository = f"{asked['organization']}/{asked['name']}"
            if repository in self.hub.branches:
                raise Refusal(409, text=json.dumps({"url": f"{self.hub.url}/{repository}"}))
            self.hub.commit(repository, {".gitattributes": b""})
            if asked.get("visibility") == "private":
                self.hub.private.add(repository)
            return _json({"url": f"{self.hub.url}/{repository}"})
        repository, kind, branch = "/".join(parts[2:4]), parts[4], parts[5]
        if kind == "branch":
            self.hub.branches[repository].setdefault(branch, self.hub.branches[repository]["main"])
            return _json({})
        if kind == "preupload":
            chosen = {"uploadMode": "lfs" if self.hub.storage else "regular", "shouldIgnore": False}
            return _json({"files": [{**file, **chosen} for file in json.loads(body)["files"]]})
        lines = [json.loads(line) for line in body.splitlines()]
        self.hub.messages.append(lines[0]["value"]["summary"])
        files = {line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines[1:]}
        commit = self.hub.commit(repository, files, branch)
        return _json({"commitOid": commit, "commitUrl": f"{self.hub.url}/{repository}/commit/{commit}"})


def _json(value: object) -> tuple[bytes, dict[str, str]]:
    return json.dumps(value).encode(), {"Content-Type": "application/json"}


def _etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@contextmanager
def serve() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("HubHandler", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def use(hub: Hub, monkeypatch: pytest.MonkeyPatch, cache: object) -> None:
    """Make huggingface_hub in this process use ``hub`` and store downloads in ``cache``."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
