"""A Hugging Face Hub on the loopback: the endpoints that huggingface_hub 2.4 calls to push and load a model,
with large files by HTTP or, where ``xet`` is a folder, by hf_xet.

``fail`` makes an endpoint answer wrongly for a number of calls; with "hold" it waits, so that a test can end
the client in the middle.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

from support.local_xet import address_of, read_content

TOKEN = "hf_atokenthatnofilemayhold"
LARGE = (".safetensors", ".png", ".bin")  # in the large file storage
ROUTES = (
    ("whoami", "GET", r"/api/whoami-v2"),
    ("create", "POST", r"/api/repos/create"),
    ("validate", "POST", r"/api/validate-yaml"),
    ("preupload", "POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/preupload/main"),
    ("commit", "POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/commit/main"),
    ("tree", "GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)(?P<path>/.*)?"),
    ("info", "GET", r"/api/models/(?P<repo>[^/]+/[^/]+)"),
    ("xet", "GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/xet-write-token/main"),
    ("batch", "POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch"),
    ("put", "PUT", r"/storage/(?P<oid>[0-9a-f]{64})"),
    ("verify", "POST", r"/verify"),
    ("file", "HEAD", r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)"),
    ("file", "GET", r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)"),
)


@dataclass
class Fault:
    """kind: an HTTP status; "reset", which ends the connection; "landed", which does the call and then
    answers 503; "hold", which waits for ``release`` before it does the call; "wrong", which stores other
    bytes.
    """

    kind: int | str
    count: int
    reached: threading.Event = field(default_factory=threading.Event)
    release: threading.Event = field(default_factory=threading.Event)


@dataclass
class Repository:
    private: bool
    files: dict[str, bytes] = field(default_factory=lambda: {".gitattributes": b"*.safetensors lfs\n"})
    commits: list[str] = field(default_factory=lambda: ["initial commit"])

    @property
    def head(self) -> str:
        return hashlib.sha1(str(len(self.commits)).encode()).hexdigest()


class FakeHub:
    """owner: of the token. Calls are counted by endpoint, ``headers`` holds those of every call."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.storage: dict[str, bytes] = {}
        self.xet: Path | None = None  # folder of what hf_xet uploads
        self.faults: dict[str, Fault] = {}
        self.calls: Counter[str] = Counter()
        self.headers: list[tuple[str, str]] = []  # endpoint, Authorization
        self.lock = threading.RLock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def fail(self, endpoint: str, kind: int | str, count: int = 1) -> Fault:
        self.faults[endpoint] = Fault(kind, count)
        return self.faults[endpoint]

    def fault_of(self, endpoint: str) -> Fault | None:
        with self.lock:
            fault = self.faults.get(endpoint)
            if fault is None or fault.count == 0:
                return None
            fault.count -= 1
            return fault

    # endpoints ----------------------------------------------------------------------------------------------

    def answer(self, endpoint: str, match: dict[str, str], body: bytes) -> Any:
        with self.lock:
            return getattr(self, f"_{endpoint}")(match, body)

    def _whoami(self, match: Any, body: bytes) -> Any:
        return {"name": "ann", "type": "user", "orgs": []}

    def _create(self, match: Any, body: bytes) -> Any:
        request = json.loads(body)
        name = f"{request.get('organization') or 'ann'}/{request['name']}"
        if not name.startswith("ann/"):
            return 403, {"error": "you may not create repositories there"}
        if name in self.repositories:
            return 409, {"error": "You already created this model repo", "url": f"{self.url}/{name}"}
        self.repositories[name] = Repository(request.get("visibility", "public") == "private")
        return {"url": f"{self.url}/{name}", "name": name}

    def _validate(self, match: Any, body: bytes) -> Any:
        content = json.loads(body)["content"]
        if "license: not-a-license" in content:
            return 400, {"errors": [{"message": '"license" must be one of [...]'}], "warnings": []}
        return {"errors": [], "warnings": []}

    def _preupload(self, match: dict[str, str], body: bytes) -> Any:
        stored = self.repositories[match["repo"]].files
        files = []
        for file in json.loads(body)["files"]:
            path = file["path"]
            mode = "lfs" if path.endswith(LARGE) else "regular"
            oid = _oid(stored[path], path) if path in stored else None
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": files}

    def _batch(self, match: Any, body: bytes) -> Any:
        objects: list[dict[str, Any]] = []
        for item in json.loads(body)["objects"]:
            actions = {
                "upload": {"href": f"{self.url}/storage/{item['oid']}", "header": {}},
                "verify": {"href": f"{self.url}/verify", "header": {}},
            }
            is_stored = item["oid"] in self.storage
            objects.append(item if is_stored else {**item, "actions": actions})
        return {"transfer": "basic", "objects": objects}

    def _put(self, match: dict[str, str], body: bytes) -> Any:
        if hashlib.sha256(body).hexdigest() != match["oid"]:
            return 400, {"error": "other content"}
        self.storage[match["oid"]] = body
        return {}

    def _verify(self, match: Any, body: bytes) -> Any:
        request = json.loads(body)
        is_whole = len(self.storage.get(request["oid"], b"")) == request["size"]
        return {} if is_whole else (400, {"error": "not there"})

    def _commit(self, match: dict[str, str], body: bytes) -> Any:
        repository = self.repositories[match["repo"]]
        lines = [json.loads(line) for line in body.splitlines()]
        files = dict(repository.files)
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                content = self._large_file(value["oid"])
                if content is None:
                    return 400, {"error": f"{value['path']} was not uploaded"}
                files[value["path"]] = content
            else:
                del files[value["path"]]
        repository.files = files
        repository.commits.append(lines[0]["value"]["summary"])
        return {
            "commitUrl": f"{self.url}/{match['repo']}/commit/{repository.head}",
            "commitOid": repository.head,
        }

    def _large_file(self, oid: str) -> bytes | None:
        """The content with this SHA-256, however it was uploaded."""
        if oid not in self.storage and self.xet is not None:
            content = read_content(self.xet, oid)
            if content is None or hashlib.sha256(content).hexdigest() != oid:
                return None
            self.storage[oid] = content
        return self.storage.get(oid)

    def _xet(self, match: Any, body: bytes) -> Any:
        assert self.xet is not None, "huggingface_hub uses hf_xet although the test turned it off"
        return {"casUrl": address_of(self.xet), "accessToken": "of-xet", "exp": int(time.time()) + 3600}

    def _tree(self, match: dict[str, str], body: bytes) -> Any:
        if match.get("path"):
            return 404, {"error": "no such folder"}
        return [_entry(path, data) for path, data in self.repositories[match["repo"]].files.items()]

    def _info(self, match: dict[str, str], body: bytes) -> Any:
        repository = self.repositories[match["repo"]]
        files = [{"rfilename": path} for path in repository.files]
        return {"id": match["repo"], "private": repository.private, "sha": repository.head, "siblings": files}


def _oid(data: bytes, path: str) -> str:
    if path.endswith(LARGE):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _entry(path: str, data: bytes) -> dict[str, Any]:
    entry = {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
    if path.endswith(LARGE):
        return {**entry, "lfs": {"oid": _oid(data, path), "size": len(data), "pointerSize": 130}}
    return {**entry, "oid": _oid(data, path)}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def handle_any(self) -> None:
        body = self._read_body()
        url = urlparse(self.path)
        path = unquote(url.path)
        for endpoint, method, pattern in ROUTES:
            match = re.fullmatch(pattern, path)
            if method == self.command and match is not None:
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    self._count_and_answer(endpoint, match.groupdict(), body)
                return
        self._send(404, {"error": f"no route {self.command} {path}"})

    def _count_and_answer(self, endpoint: str, match: dict[str, str], body: bytes) -> None:
        hub = self.hub
        authorization = self.headers.get("Authorization", "")
        with hub.lock:
            hub.calls[endpoint] += 1
            hub.headers.append((endpoint, authorization))
        fault = hub.fault_of(endpoint)
        if fault is not None and self._fails_at_once(fault):
            return
        if endpoint not in ("put", "file") and authorization != f"Bearer {TOKEN}":
            self._send(401, {"error": "Invalid credentials"})
        elif "repo" in match and match["repo"] not in hub.repositories:
            self._send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        elif endpoint == "file":
            self._send_file(match)
        else:
            answer = hub.answer(endpoint, match, body)
            if fault is not None and fault.kind == "landed":
                answer = (503, {"error": "a planted fault"})
            if fault is not None and fault.kind == "wrong":
                hub.repositories[match["repo"]].files["config.json"] += b" "
            status, content = answer if isinstance(answer, tuple) else (200, answer)
            self._send(status, content)

    def _fails_at_once(self, fault: Fault) -> bool:
        """Whether the call is not done: an HTTP status, a connection that ends, now or when the test says."""
        fault.reached.set()
        if isinstance(fault.kind, int):
            self._send(fault.kind, {"error": "a planted fault"})
            return True
        if fault.kind == "hold":
            fault.release.wait(60)
        if fault.kind in ("hold", "reset"):
            self.close_connection = True
            self.connection.close()
            return True
        return False

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _send_file(self, match: dict[str, str]) -> None:
        repository = self.hub.repositories[match["repo"]]
        data = repository.files.get(match["path"])
        if data is None:
            self._send(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{_oid(data, match["path"])}"')
        self.send_header("X-Repo-Commit", repository.head)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def _send(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    do_GET = do_POST = do_PUT = do_HEAD = handle_any

    def log_message(self, format: str, *args: Any) -> None:
        del format, args


@contextlib.contextmanager
def running_hub() -> Iterator[FakeHub]:
    hub = FakeHub()
    thread = threading.Thread(target=hub.server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        for fault in hub.faults.values():
            fault.release.set()
        hub.server.shutdown()
        hub.server.server_close()
        thread.join()
