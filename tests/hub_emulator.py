# Licensed under the Apache License, Version 2.0
"""A small Hub on this machine: the part of the Hub's HTTP API that pushing and loading models uses, in memory.

Repositories with branches and commits, accounts with tokens, large files through LFS, and the Hub's error codes. Tests
look at `Hub.repositories` from outside, and set `Hub.answers` or `Hub.break_uploads` to have requests fail.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import os
import re
import socket
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


WRITER, READER = "hf_writer", "hf_reader"
ACCOUNTS = {WRITER: ("me", "write"), READER: ("guest", "read")}
LARGE = (".safetensors", ".bin")


@dataclass
class File:
    content: bytes
    is_large: bool

    @functools.cached_property
    def etag(self) -> str:
        """What the Hub calls a file: the hash of its content, or of its git blob."""
        if self.is_large:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


@dataclass
class Commit:
    message: str
    files: dict[str, File]

    @property
    def sha(self) -> str:
        listing = [(path, file.etag) for path, file in sorted(self.files.items())]
        return hashlib.sha1(repr((self.message, listing)).encode()).hexdigest()


@dataclass
class Repository:
    private: bool
    branches: dict[str, list[Commit]] = field(default_factory=lambda: {"main": [Commit("initial commit", {})]})

    def find(self, revision: str) -> Commit | None:
        """The commit of a branch's end, or of a hash."""
        if revision in self.branches:
            return self.branches[revision][-1]
        return next((commit for log in self.branches.values() for commit in log if commit.sha == revision), None)

    @property
    def pushes(self) -> list[Commit]:
        """What was committed to `main` after the repository was made."""
        return self.branches["main"][1:]


class Refusal(Exception):
    """An answer that is an error, with the code that the client reads."""

    def __init__(self, status: int, message: str, code: str = ""):
        self.status, self.message, self.code = status, message, code


class Hub:
    """State and address of the server; use it as a context manager."""

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}  # by hash; shared by all repositories, as uploads come before commits
        self.requests: list[tuple[str, str]] = []
        self.answers: dict[str, int] = {}  # by method and path: statuses to refuse with
        self.break_uploads: Callable[[bytes], bool] = lambda content: False
        self.lock = threading.Lock()
        handler = type("Handler", (Handler,), {"hub": self})
        self.url = url()
        self.server = ThreadingHTTPServer(("127.0.0.1", urlsplit(self.url).port), handler)

    def __enter__(self) -> Hub:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.server.shutdown()
        self.server.server_close()

    def hold(self, name: str, folder: Path) -> None:
        """A public repository with the files of a folder."""
        files = {
            path.relative_to(folder).as_posix(): File(path.read_bytes(), path.suffix in LARGE)
            for path in folder.rglob("*")
            if path.is_file()
        }
        self.repositories[name] = Repository(False, {"main": [Commit("initial commit", {}), Commit("upload", files)]})


@functools.cache
def url() -> str:
    """Of every Hub of this process, one after another: what has imported the client, which reads it then, can be used again."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


@functools.cache
def _home() -> Path:
    """The cache that clients know, for the same reason: a link to that of the moment."""
    return Path(tempfile.mkdtemp(prefix="hub-", dir=os.environ["HF_HOME"])) / "home"


def environment(home: os.PathLike | None = None, token: str | None = WRITER) -> dict[str, str]:
    """Of a process that knows no other Hub, with this folder as its cache until another is asked for."""
    if home is not None:
        Path(home).mkdir(exist_ok=True)
        _home().unlink(missing_ok=True)
        _home().symlink_to(Path(home).absolute())
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return environment | {
        "HF_ENDPOINT": url(),
        "HF_HOME": str(_home()),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1",
        "PYTHONPATH": str(Path(__file__).resolve().parents[1]),
        **({"HF_TOKEN": token} if token else {}),
    }


class Handler(BaseHTTPRequestHandler):
    """One request; `ROUTES` below says which method answers it."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def answer_request(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self._read_body()
        self.hub.requests.append((self.command, path))
        try:
            if status := self.hub.answers.get(f"{self.command} {path}"):
                raise Refusal(status, f"refused with {status}")
            for methods, pattern, answer in ROUTES:
                match = re.fullmatch(pattern, path)
                if match and self.command in methods.split():
                    return answer(self, body, *match.groups())
            raise Refusal(404, f"no route for {self.command} {path}")
        except Refusal as refusal:
            headers = {"X-Error-Message": refusal.message}
            headers |= {"X-Error-Code": refusal.code} if refusal.code else {}
            self.reply({"error": refusal.message}, refusal.status, headers)

    do_GET = do_HEAD = do_POST = do_PUT = answer_request

    def reply(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    # Who may do what

    def account(self) -> tuple[str, str] | None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in ACCOUNTS:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return ACCOUNTS.get(token)

    def readable(self, name: str) -> Repository:
        account, repository = self.account(), self.hub.repositories.get(name)
        if repository is None or (repository.private and (not account or account[0] != name.split("/")[0])):
            # As the Hub does: who is not logged in is not told what exists.
            raise Refusal(404 if account else 401, "Repository not found", "RepoNotFound")
        return repository

    def check_writable(self, namespace: str) -> None:
        account = self.account()
        if account is None:
            raise Refusal(401, "Invalid username or password.")
        if account != (namespace, "write"):
            raise Refusal(403, f"You don't have the rights to write under the namespace {namespace!r}")

    def writable(self, name: str) -> Repository:
        repository = self.readable(name)
        self.check_writable(name.split("/")[0])
        return repository

    def commit_of(self, name: str, revision: str | None) -> Commit:
        commit = self.readable(name).find(revision or "main")
        if commit is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    # Answers

    def whoami(self, body: bytes) -> None:
        account = self.account()
        if account is None:
            raise Refusal(401, "Invalid username or password.")
        name, role = account
        self.reply({"type": "user", "name": name, "orgs": [], "auth": {"accessToken": {"role": role}}})

    def create(self, body: bytes) -> None:
        asked, account = json.loads(body), self.account()
        namespace = asked.get("organization") or (account[0] if account else "")
        self.check_writable(namespace)
        name = f"{namespace}/{asked['name']}"
        exists = name in self.hub.repositories
        if not exists:
            self.hub.repositories[name] = Repository(
                private=asked.get("visibility") == "private" or asked.get("private", False)
            )
        self.reply({"url": f"{self.hub.url}/{name}", "name": name, "id": name}, 409 if exists else 200)

    def validate_card(self, body: bytes) -> None:
        """The rules of the Hub that cards of this package could break."""
        import yaml

        content = json.loads(body)["content"]
        metadata = yaml.safe_load(content.split("---")[1]) if content.startswith("---") else {}
        errors = []
        for key in ("base_model", "datasets", "tags"):
            values = metadata.get(key, [])
            if not all(isinstance(value, str) for value in ([values] if isinstance(values, str) else values)):
                errors.append(f"{key} must be names")
        bases = metadata.get("base_model", [])
        for base in [bases] if isinstance(bases, str) else bases:
            if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base):
                errors.append(f"base_model {base!r} is not a name on the Hub")
        if metadata.get("license") == "other" and not metadata.get("license_name"):
            errors.append("license other needs license_name")
        for model in metadata.get("model-index", []):
            if not model.get("name") or not all(result.get("metrics") for result in model["results"]):
                errors.append("model-index needs a name and metrics")
            for kind in (result["dataset"]["type"] for result in model["results"]):
                if not re.fullmatch(r"([\w-]+/)?[\w.-]+", kind):
                    errors.append(f"dataset type {kind!r} does not have the form of a name on the Hub")
        report = {"errors": [{"message": message} for message in errors], "warnings": []}
        self.reply(report, 400 if errors else 200)

    def preupload(self, body: bytes, name: str, revision: str) -> None:
        self.writable(name)
        modes = [
            {"path": path, "uploadMode": "lfs" if path.endswith(LARGE) else "regular", "shouldIgnore": False}
            for path in (file["path"] for file in json.loads(body)["files"])
        ]
        self.reply({"files": modes})

    def lfs_batch(self, body: bytes, name: str) -> None:
        self.writable(name)
        objects = []
        for asked in json.loads(body)["objects"]:
            upload = {"upload": {"href": f"{self.hub.url}/lfs/{asked['oid']}"}}
            objects.append({**asked, **({} if asked["oid"] in self.hub.large else {"actions": upload})})
        self.reply({"transfer": "basic", "objects": objects}, headers={"Content-Type": "application/vnd.git-lfs+json"})

    def lfs_upload(self, body: bytes, sha: str) -> None:
        if self.hub.break_uploads(body):
            self.close_connection = True  # no answer at all
            return
        if hashlib.sha256(body).hexdigest() != sha:
            raise Refusal(400, "content does not have the hash it was announced with")
        self.hub.large[sha] = body
        self.reply({})

    def branch(self, body: bytes, name: str, branch: str) -> None:
        repository = self.writable(name)
        if branch in repository.branches:
            raise Refusal(409, f"Reference already exists: {branch}")
        repository.branches[branch] = list(repository.branches["main"])
        self.reply({})

    def commit(self, body: bytes, name: str, branch: str) -> None:
        repository = self.writable(name)
        if branch not in repository.branches:
            raise Refusal(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        with self.hub.lock:
            files, message = dict(repository.branches[branch][-1].files), ""
            for line in map(json.loads, body.splitlines()):
                kind, value = line["key"], line["value"]
                if kind == "header":
                    message = value["summary"]
                elif kind == "file":
                    files[value["path"]] = File(base64.b64decode(value["content"]), False)
                elif kind == "lfsFile":
                    files[value["path"]] = File(self.hub.large[value["oid"]], True)
                elif kind == "deletedFile":
                    del files[value["path"]]
            commit = Commit(message, files)
            repository.branches[branch].append(commit)
        url = f"{self.hub.url}/{name}/commit/{commit.sha}"
        self.reply({"commitUrl": url, "commitOid": commit.sha, "success": True})

    def info(self, body: bytes, name: str, revision: str | None) -> None:
        commit = self.commit_of(name, revision)
        files = [{"rfilename": path} for path in commit.files]
        private = self.hub.repositories[name].private
        self.reply({"id": name, "modelId": name, "sha": commit.sha, "private": private, "tags": [], "siblings": files})

    def tree(self, body: bytes, name: str, revision: str, folder: str | None) -> None:
        entries = []
        for path, file in self.commit_of(name, revision).files.items():
            if path.startswith(f"{folder}/" if folder else ""):
                entry = {"type": "file", "path": path, "size": len(file.content), "oid": file.etag}
                large = {"lfs": {"oid": file.etag, "size": len(file.content), "pointerSize": 130}}
                entries.append({**entry, **(large if file.is_large else {})})
        if folder and not entries:
            raise Refusal(404, f"{folder} does not exist", "EntryNotFound")
        self.reply(entries)

    def resolve(self, body: bytes, name: str, revision: str, path: str) -> None:
        commit = self.commit_of(name, revision)
        if path not in commit.files:
            raise Refusal(404, f"{path} does not exist", "EntryNotFound")
        file = commit.files[path]
        headers = {"X-Repo-Commit": commit.sha, "ETag": f'"{file.etag}"', "Content-Type": "application/octet-stream"}
        self.reply(file.content, headers=headers)


NAME = r"([^/]+/[^/]+)"
ROUTES = [
    ("GET", r"/api/whoami-v2", Handler.whoami),
    ("POST", r"/api/repos/create", Handler.create),
    ("POST", r"/api/validate-yaml", Handler.validate_card),
    ("POST", rf"/api/models/{NAME}/preupload/([^/]+)", Handler.preupload),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT", r"/lfs/([0-9a-f]{64})", Handler.lfs_upload),
    ("POST", rf"/api/models/{NAME}/branch/([^/]+)", Handler.branch),
    ("POST", rf"/api/models/{NAME}/commit/([^/]+)", Handler.commit),
    ("GET", rf"/api/models/{NAME}(?:/revision/([^/]+))?", Handler.info),
    ("GET", rf"/api/models/{NAME}/tree/([^/]+)(?:/(.+))?", Handler.tree),
    ("GET HEAD", rf"/{NAME}/resolve/([^/]+)/(.+)", Handler.resolve),
]
