"""A small Hugging Face Hub: what `huggingface_hub` asks of the real one to download a model, on a local port."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

from typing_extensions import override

TOKEN = "hf_fake"


@dataclass
class Repository:
    """A model's commits with their files, and the branches and tags that name them."""

    commits: dict[str, Mapping[str, bytes]]
    refs: dict[str, str]
    access: str = "public"
    """'public', 'private', which hides the repository without TOKEN, or 'gated', which hides the files' content."""


@dataclass
class FakeHub:
    """The repositories, and what has been asked of them."""

    url: str
    cdn_url: str
    repositories: dict[str, Repository] = field(default_factory=dict)
    downloads: list[str] = field(default_factory=list)
    """The files whose content has been sent, by their names."""
    tokens: set[str] = field(default_factory=set)
    """The tokens of the requests about repositories; "" for none."""
    moves_after_listing: dict[str, Mapping[str, bytes]] = field(default_factory=dict)
    """The files of a commit that is pushed to a repository's main as soon as its current commit has been named."""

    def add(self, name: str, files: Mapping[str, bytes], access: str = "public") -> str:
        """Adds a commit to the branch main, creating the repository if necessary; returns the commit."""
        commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        repository = self.repositories.setdefault(name, Repository({}, {}, access))
        repository.commits[commit] = files
        repository.refs["main"] = commit
        return commit


@contextmanager
def running_hub() -> Iterator[FakeHub]:
    """Serves an empty Hub until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        @override
        def log_message(self, format: str, *args: object) -> None:
            """Logs nothing."""

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
            if parts[0] == "cdn":
                self._send_file("/".join(parts[3:]), hub.repositories["/".join(parts[1:3])].commits)
                return
            is_api = parts[:2] == ["api", "models"]
            if len(parts) < 3 or (parts[0] == "api" and not is_api):
                self._refuse(404, "")
                return
            hub.tokens.add(token)
            owner, name, method, *rest = parts[2:] if is_api else parts
            repository = hub.repositories.get(f"{owner}/{name}")
            if token not in ("", TOKEN):
                self._refuse(401, "", "Invalid credentials in Authorization header")
            elif repository is None or (repository.access == "private" and not token):
                self._refuse(404 if token else 401, "RepoNotFound")
            elif (commit := repository.refs.get(rest[0], rest[0])) not in repository.commits:
                self._refuse(404, "RevisionNotFound")
            elif method == "revision":
                files = repository.commits[commit]
                self._send_json({"id": f"{owner}/{name}", "sha": commit, "siblings": [{"rfilename": f} for f in files]})
                if (pushed := hub.moves_after_listing.pop(f"{owner}/{name}", None)) is not None:
                    hub.add(f"{owner}/{name}", pushed)
            elif method == "tree":
                self._send_json([_entry(path, data) for path, data in repository.commits[commit].items()])
            elif repository.access == "gated" and not token:
                self._refuse(401, "GatedRepo")
            elif (path := "/".join(rest[1:])) not in repository.commits[commit]:
                self._refuse(404, "EntryNotFound")
            else:
                data = repository.commits[commit][path]
                headers = {"X-Repo-Commit": commit, "ETag": f'"{_blob_id(data)}"'}
                if _is_large(path):  # stored on another host
                    location = f"{hub.cdn_url}/cdn/{owner}/{name}/{commit}/{path}"
                    linked = {"X-Linked-Etag": f'"{_sha256(data)}"', "X-Linked-Size": str(len(data))}
                    self._send(302, b"", headers | linked | {"Location": location})
                    return
                if self.command == "GET":
                    hub.downloads.append(path)
                self._send(200, data, headers)

        def _send_file(self, path: str, commits: Mapping[str, Mapping[str, bytes]]) -> None:
            commit, _, path = path.partition("/")
            if self.command == "GET":
                hub.downloads.append(path)
            self._send(200, commits[commit][path], {"ETag": f'"{_sha256(commits[commit][path])}"'})

        def _refuse(self, status: int, code: str, message: str = "refused") -> None:
            self._send(status, b"", {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {}))

        def _send_json(self, content: object) -> None:
            self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

        def _send(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub = FakeHub(f"http://127.0.0.1:{server.server_port}", f"http://localhost:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()


def _entry(path: str, data: bytes) -> dict[str, object]:
    entry: dict[str, object] = {"type": "file", "path": path, "size": len(data), "oid": _blob_id(data)}
    if _is_large(path):
        entry["lfs"] = {"oid": _sha256(data), "size": len(data), "pointerSize": 134}
    return entry


def _is_large(path: str) -> bool:
    return path.endswith((".safetensors", ".bin", ".model"))


def _blob_id(data: bytes) -> str:
    """Git's hash of a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
