"""A small Hub on this machine: the endpoints that pushing and pulling a profile use, with faults.

It speaks what `huggingface_hub` speaks to the real one: create, preupload, LFS batch and upload,
commit, YAML check, info, and resolve with HEAD, GET and ranges. Xet storage is not here; tests turn
it off.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from huggingface_hub import close_session, constants

TOKEN = "hf_a_token_of_this_test"


class Hub(ThreadingHTTPServer):
    """Repositories as lists of commits, the newest last.

    Attributes
    ----------
    repos : dict
        Repository -> list of (commit, files by name).
    private : set of str
        Repositories that need the token to be read.
    requests : list of str
        Method and path of all requests.
    fault : Callable
        From method and path to a status, to "cut" for half of a body, or to None.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, list[tuple[str, dict[str, bytes]]]] = {}
        self.private: set[str] = set()
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.fault: Callable[[str, str], int | str | None] = lambda method, path: None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def commit(self, repo: str, files: dict[str, bytes]) -> str:
        """Add a commit that has exactly these files."""
        commits = self.repos.setdefault(repo, [])
        sha = hashlib.sha1(f"{repo}{len(commits)}".encode()).hexdigest()
        commits.append((sha, files))
        return sha

    def files(self, repo: str) -> dict[str, bytes]:
        return self.repos[repo][-1][1]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.dispatch()

    def do_GET(self) -> None:
        self.dispatch()

    def do_POST(self) -> None:
        self.dispatch()

    def do_PUT(self) -> None:
        self.dispatch()

    def dispatch(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        self.server.requests.append(f"{self.command} {path}")
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            self.body = self.read_chunks()
        self.cut = False
        fault = self.server.fault(self.command, path)
        if isinstance(fault, int):
            return self.answer(fault, b"{}")
        self.cut = fault == "cut"
        writes = self.command in {"POST", "PUT"} and not path.startswith("lfs/")
        if writes and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(401, b'{"error": "Invalid username or password."}')
        parts = path.split("/")
        if not path:
            return self.answer(200)
        if path == "api/repos/create":
            return self.create()
        if path == "api/validate-yaml":
            return self.validate_yaml()
        if path.endswith("/info/lfs/objects/batch"):
            return self.lfs_batch()
        if parts[0] == "lfs":
            self.server.objects[parts[1]] = self.body
            return self.answer(200)
        if path == "api/agent-harnesses":
            return self.answer(404)  # the client asks, and does without
        if parts[:2] == ["api", "models"] and len(parts) == 4:
            return self.info("/".join(parts[2:]))
        if parts[0] == "api" and parts[4] == "preupload":
            return self.preupload()
        if parts[0] == "api" and parts[4] == "commit":
            return self.add_commit("/".join(parts[2:4]))
        if parts[2] == "resolve":
            return self.resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        raise AssertionError(f"an endpoint that this server does not have: {self.command} {path}")

    def read_chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.cut:
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
        else:
            self.wfile.write(body)

    def answer_json(self, value: object, status: int = 200) -> None:
        self.answer(status, json.dumps(value).encode(), Content_Type="application/json")

    def create(self) -> None:
        asked = json.loads(self.body)
        repo = f"{asked['organization']}/{asked['name']}"
        if repo in self.server.repos:
            return self.answer_json({"error": "exists", "url": f"{self.server.url}/{repo}"}, 409)
        self.server.commit(repo, {})
        if asked.get("private") or asked.get("visibility") == "private":
            self.server.private.add(repo)
        self.answer_json({"url": f"{self.server.url}/{repo}"})

    def info(self, repo: str) -> None:
        if self.readable(repo):
            self.answer_json({"id": repo, "sha": self.server.repos[repo][-1][0]})

    def readable(self, repo: str) -> bool:
        """Whether the asker may read a repository; answers if not."""
        if repo not in self.server.repos:
            self.answer(404, X_Error_Code="RepoNotFound")
            return False
        if repo in self.server.private and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer(401, X_Error_Message="Invalid username or password.")
            return False
        return True

    def validate_yaml(self) -> None:
        header = json.loads(self.body)["content"].split("---\n")[1]
        found = yaml.safe_load(header)
        if not isinstance(found, dict):
            return self.answer_json({"errors": [{"message": "no mapping"}]}, 400)
        self.answer_json({"errors": [], "warnings": []})

    def preupload(self) -> None:
        # As on the Hub, where .gitattributes sends binary formats to LFS.
        self.answer_json(
            {
                "files": [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if file["path"].endswith("safetensors") else "regular",
                        "shouldIgnore": False,
                    }
                    for file in json.loads(self.body)["files"]
                ]
            }
        )

    def lfs_batch(self) -> None:
        self.answer_json(
            {
                "transfer": "basic",
                "objects": [
                    {
                        **each,
                        "actions": {"upload": {"href": f"{self.server.url}/lfs/{each['oid']}"}},
                    }
                    for each in json.loads(self.body)["objects"]
                ],
            }
        )

    def add_commit(self, repo: str) -> None:
        if repo not in self.server.repos:
            return self.answer(404, b"{}", X_Error_Code="RepoNotFound")
        files = dict(self.server.files(repo))
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        sha = self.server.commit(repo, files)
        self.answer_json({"commitUrl": f"{self.server.url}/{repo}/commit/{sha}", "commitOid": sha})

    def resolve(self, repo: str, revision: str, name: str) -> None:
        if not self.readable(repo):
            return
        commits = self.server.repos[repo]
        found = commits[-1:] if revision == "main" else [c for c in commits if c[0] == revision]
        if not found:
            return self.answer(404, X_Error_Code="RevisionNotFound")
        sha, files = found[0]
        if name not in files:
            return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
        etag = hashlib.sha1(files[name]).hexdigest()
        headers = {"ETag": f'"{etag}"', "X_Repo_Commit": sha}
        if asked := self.headers.get("Range"):
            start = int(asked.removeprefix("bytes=").rstrip("-"))
            return self.answer(206, files[name][start:], **headers)
        self.answer(200, files[name], **headers)


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A Hub on a free port."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()


@contextmanager
def connected_hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub, with the endpoint, cache and token of this process's client pointed at it."""
    with running_hub() as hub:
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        # The client waits between its attempts.
        monkeypatch.setattr(time, "sleep", lambda seconds: None)
        # Connections to an earlier test's server are dead.
        close_session()
        yield hub
        close_session()
