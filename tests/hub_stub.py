"""A Hugging Face hub on this machine: as much of its API as `snapshot_download` needs, serving folders."""

import hashlib
import json
import os
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

TOKEN = "hf_accepted"
"""The token of somebody who has accepted the terms of gated repositories."""

INFO_OR_TREE = re.compile("/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?")
FILE = re.compile("/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


class HubStub:
    """Serve folders as repositories while the `with` block runs.

        with HubStub({"org/name": {"main": folder}}) as hub:
            subprocess.run(command, env=hub.environment(tmp_path))

    huggingface_hub settles on its endpoint when it is imported, so that only a new process can be sent here.

    Args:
        repositories: `{"org/name": {revision: folder}}`.
        gated: `{"org/name": kinds of request that need `TOKEN`}`; kinds are "revision", "tree" and "resolve".
        broken: names of files whose transfer breaks off in the middle, once; after that they are unavailable.
        resized: names of files that the hub announces with 7 bytes more than it then sends.
        mistaken: names of files that the hub announces with an ETag of other content.

    Attributes:
        requests: list of "METHOD path", as they came.
    """

    def __init__(self, repositories, gated=None, broken=(), resized=(), mistaken=()):
        self.repositories = repositories
        self.gated = gated or {}
        self.broken = broken
        self.resized = resized
        self.mistaken = mistaken
        self.requests = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.hub = self
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home, **changes):
        """Environment variables of a process that has this hub, `home` for all its caches, and no other network."""
        inherited = {
            k: v
            for k, v in os.environ.items()
            if not k.startswith(("HF_", "HUGGING", "KAGGLE", "KERAS_VAULTGEMMA", "XDG_"))
        }
        nowhere = dict.fromkeys(
            ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), "http://127.0.0.1:9"
        )
        local = dict.fromkeys(("NO_PROXY", "no_proxy"), "127.0.0.1")
        own = {"HOME": str(home), "HF_ENDPOINT": self.url, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        return {**inherited, **nowhere, **local, **own, **changes}

    def commit(self, repository, revision="main"):
        """The commit hash of a revision: 40 digits that follow from its files."""
        folder = self.repositories[repository][revision]
        parts = (
            part for name, content in _files(folder).items() for part in (name.encode(), content)
        )
        return hashlib.sha1(b"\0".join(parts)).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        hub = self.server.hub
        hub.requests.append(f"{self.command} {self.path}")
        path = unquote(self.path.partition("?")[0])
        question, download = INFO_OR_TREE.fullmatch(path), FILE.fullmatch(path)
        if question:
            repository, kind, revision = (
                question[1],
                question[2] or "revision",
                question[3] or "main",
            )
        elif download:
            repository, kind, revision = download[1], "resolve", download[2]
        else:
            return self._refuse(404, "NotFound", "No such page")
        if repository not in hub.repositories:
            return self._refuse(404, "RepoNotFound", "Repository not found")
        authorization = self.headers.get("Authorization")
        if kind in hub.gated.get(repository, ()) and authorization != f"Bearer {TOKEN}":
            message = f"Access to model {repository} is restricted"
            return self._refuse(403 if authorization else 401, "GatedRepo", message)
        commits = {hub.commit(repository, name): name for name in hub.repositories[repository]}
        name = commits.get(revision, revision)
        if name not in hub.repositories[repository]:
            return self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files = _files(hub.repositories[repository][name])
        commit = hub.commit(repository, name)
        if kind == "revision":
            siblings = [{"rfilename": file} for file in files]
            return self._answer_json({"id": repository, "sha": commit, "siblings": siblings})
        if kind == "tree":
            return self._answer_json(
                [
                    {
                        "type": "file",
                        "path": file,
                        "size": len(content),
                        "oid": hashlib.sha1(content).hexdigest(),
                    }
                    for file, content in files.items()
                ]
            )
        file = download[3]
        if file not in files:
            return self._refuse(404, "EntryNotFound", "Entry not found")
        announced = files[file] + b"?" * (file in hub.mistaken)
        etag = f'"{hashlib.sha256(announced).hexdigest()}"'
        headers = {"ETag": etag, "X-Repo-Commit": commit}
        if file in hub.resized:
            headers["X-Linked-Size"] = len(files[file]) + 7
        self._answer(files[file], headers, breaks=file in hub.broken)

    do_HEAD = do_GET

    def _refuse(self, status, code, message):
        self._answer_json(
            {"error": message}, status, {"X-Error-Code": code, "X-Error-Message": message}
        )

    def _answer_json(self, value, status=200, headers=None):
        headers = {"Content-Type": "application/json", **(headers or {})}
        self._answer(json.dumps(value).encode(), headers, status)

    def _answer(self, body, headers, status=200, breaks=False):
        seen_before = self.server.hub.requests.count(f"{self.command} {self.path}") > 1
        if breaks and self.command == "GET" and seen_before:
            return self._refuse(500, "InternalError", "Internal error")
        self.send_response(status)
        for name, value in {**headers, "Content-Length": len(body)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: len(body) // 2] if breaks else body)
            self.close_connection = breaks

    def log_message(self, *_):
        pass


def _files(folder):
    """{path inside the folder: content}."""
    paths = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
