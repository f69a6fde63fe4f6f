"""A small Hub on 127.0.0.1, so that pushing and pulling are tested over real HTTP and without a network.

It answers what huggingface_hub and hf_xet ask for models: create, preupload, LFS, xet, commit, branches, pull
requests, private repositories, resolve; one commit is one whole tree. Requests can be made to fail (`Hub.fail`).

    with Hub() as hub:
        env = hub.environment(home)  # for a process of its own: huggingface_hub reads HF_ENDPOINT when it is imported
"""

import base64
import hashlib
import json
import re
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

from .xet_store import XetStore

LFS = (".safetensors", ".png", ".bin", ".pt", ".pth", ".model")
OWNER, STRANGER = "hf_ownerownerownerownerownerownerowne", "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"


@dataclass
class Blob:
    """A file in a commit: its bytes, or the SHA-256 of bytes in an object store."""

    size: int
    oid: str
    data: bytes | None = None
    sha256: str | None = None


@dataclass
class Repo:
    """Commits by id, each a whole tree; branches and pull requests by name; and what was said with each commit."""

    owner: str
    private: bool
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    messages: list[tuple[str, str, str]] = field(default_factory=list)  # reference, message, description


@dataclass
class Fault:
    """What happens to the next `times` requests whose "METHOD path" matches: an answer 500, or a lost connection.

    "drop" loses the connection in the middle of the request, "deaf" after it was carried out.
    """

    request: str
    kind: Literal["500", "drop", "deaf"]
    times: int


class Failure(Exception):
    def __init__(self, status: int, message: str, code: str = ""):
        super().__init__(message)
        self.status, self.code = status, code


class Hub:
    """The server and all that it holds.

    Args:
        xet: whether large files go to the xet store, as on today's Hub; else they go by LFS.
    """

    def __init__(self, xet: bool = False):
        self.xet = xet
        self.users = {OWNER: "ann", STRANGER: "bob"}
        self.repos: dict[str, Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.store = XetStore()
        self.log: list[str] = []  # "METHOD path -> status"
        self.bodies: list[bytes] = []  # what has been sent here, whatever became of it
        self.faults: list[Fault] = []
        self.lock = threading.RLock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Request,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def environment(self, home: Path, token: str = OWNER) -> dict[str, str]:
        """The variables with which a new process takes this for the Hub."""
        return {
            **{"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_TOKEN": token, "HF_HUB_OFFLINE": "0"},
            **{"HF_HUB_DISABLE_XET": "0" if self.xet else "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
            **{"HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"},
            **{"HF_XET_XORB_COMPRESSION_POLICY": "none", "HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "1"},
        }

    def fail(self, request: str, kind: Literal["500", "drop", "deaf"] = "500", times: int = 1) -> None:
        """From now on, as `Fault` says."""
        self.faults.append(Fault(request, kind, times))

    def fault(self, request: str) -> str | None:
        for fault in self.faults:
            if fault.times > 0 and re.search(fault.request, request):
                fault.times -= 1
                return fault.kind
        return None

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Everything that a revision of a repository holds."""
        repo = self.repos[repo_id]
        return {path: self.read(blob) for path, blob in repo.commits[repo.refs.get(revision, revision)].items()}

    def read(self, blob: Blob) -> bytes:
        if blob.data is not None:
            return blob.data
        assert blob.sha256 is not None
        return self.lfs[blob.sha256] if blob.sha256 in self.lfs else self.store.read(self.store.by_sha256[blob.sha256])

    def commit(self, repo: Repo, source: str, target: str, lines: list[dict[str, Any]]) -> str:
        """A new commit on reference `target`, made from the tree of `source`."""
        tree = dict(repo.commits.get(repo.refs.get(source, ""), {}))
        for line in lines:
            value, path = line["value"], line["value"].get("path", "")
            if ".." in path.split("/") or path.startswith("/") or ".git" in path.split("/"):
                raise Failure(400, f"Invalid path {path!r}")
            if line["key"] == "header":
                repo.messages.append((target, value["summary"], value.get("description", "")))
            elif line["key"] == "file":
                data = base64.b64decode(value["content"])
                tree[path] = Blob(len(data), git_oid(data), data)
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.lfs and value["oid"] not in self.store.by_sha256:
                    raise Failure(400, f"{path} was never uploaded")
                pointer = f"oid sha256:{value['oid']}\nsize {value['size']}\n".encode()
                tree[path] = Blob(value["size"], git_oid(pointer), sha256=value["oid"])
            elif line["key"] == "deletedFile":
                del tree[path]
        state = repr((source, sorted((path, blob.oid) for path, blob in tree.items()), time.time_ns()))
        sha = hashlib.sha1(state.encode()).hexdigest()
        repo.commits[sha], repo.refs[target] = tree, sha
        return sha


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


ROUTES: list[tuple[str, re.Pattern[str], Callable[..., None]]] = []


def route(methods: str, pattern: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Marks a method of `Request` as the answer to a path: REPO is namespace/name, ONE one part, REST the rest."""
    for name, expression in {"REPO": "([^/]+/[^/]+)", "ONE": "([^/]+)", "REST": "(.+)"}.items():
        pattern = pattern.replace(name, expression)

    def mark(method: Callable[..., None]) -> Callable[..., None]:
        ROUTES.append((methods, re.compile(pattern), method))
        return method

    return mark


class Request(BaseHTTPRequestHandler):
    """One request; which method answers it is said by `route`."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # a body does not wait for the headers to be acknowledged
    hub: Hub
    deaf = False

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def handle_any(self) -> None:
        fault = self.hub.fault(f"{self.command} {self.path}")
        if fault == "drop":
            self.rfile.read(int(self.headers.get("Content-Length", 0)) // 2)
            return self.hang_up()
        self.body = self.read_body()
        self.hub.bodies.append(self.body)
        try:
            if fault == "500":
                raise Failure(500, "Internal Error - We're working hard to fix this as soon as possible!")
            self.deaf = fault == "deaf"
            with self.hub.lock:
                self.dispatch()
        except Failure as failure:
            headers = {"X-Error-Code": failure.code, "X-Error-Message": str(failure)}
            self.reply({"error": str(failure)}, failure.status, headers)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any

    def read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline().strip() or b"0", 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def dispatch(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        for methods, pattern, method in ROUTES:
            match = pattern.fullmatch(url.path)
            if match and self.command in methods.split():
                return method(self, *(unquote(part) for part in match.groups() if part))
        raise Failure(404, f"no answer to {self.command} {url.path}")

    def hang_up(self) -> None:
        self.hub.log.append(f"{self.command} {self.path} -> lost")
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def reply(
        self, body: Any = b"", status: int = 200, headers: dict[str, str] | None = None, length: int | None = None
    ) -> None:
        if self.deaf:
            return self.hang_up()
        kind = "application/octet-stream" if isinstance(body, bytes) else "application/json"
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": kind, **(headers or {})}
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if part and isinstance(body, bytes) and status == 200:
            first, last = int(part[1]), min(int(part[2] or len(data)), len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            data, status = data[first : last + 1], 206
        self.hub.log.append(f"{self.command} {self.path} -> {status}")
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data) if length is None else length)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    # who may do what

    def user(self) -> str | None:
        return self.hub.users.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def signed_in(self) -> str:
        user = self.user()
        if user is None:
            raise Failure(401, "Invalid username or password.")
        return user

    def repo(self, repo_id: str, write: bool = False) -> Repo:
        """A repository that the user may see; one that is private looks to others as if it did not exist."""
        repo = self.hub.repos.get(repo_id)
        user = self.signed_in() if write else self.user()
        if repo is None or (repo.private and user != repo.owner):
            raise Failure(401 if user is None else 404, "Repository not found", "RepoNotFound")
        if write and user != repo.owner:
            raise Failure(403, f"You have no right to write to {repo_id}; open a pull request with create_pr=1.")
        return repo

    def tree(self, repo_id: str, revision: str) -> tuple[str, dict[str, Blob]]:
        repo = self.repo(repo_id)
        sha = repo.refs.get(revision, revision)
        if sha not in repo.commits:
            raise Failure(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha, repo.commits[sha]

    # repositories

    @route("GET", "/api/whoami-v2")
    def whoami(self) -> None:
        self.reply({"type": "user", "name": self.signed_in(), "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    @route("POST", "/api/repos/create")
    def create(self) -> None:
        wanted, user = json.loads(self.body), self.signed_in()
        namespace = wanted.get("organization") or user
        repo_id = f"{namespace}/{wanted['name']}"
        if namespace != user:
            raise Failure(403, f"You have no right to create {repo_id}")
        if repo_id in self.hub.repos:
            return self.reply({"error": "You already created it", "url": f"{self.hub.url}/{repo_id}"}, 409)
        private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        repo = self.hub.repos[repo_id] = Repo(user, private)
        self.hub.commit(repo, "main", "main", [{"key": "file", "value": {"path": ".gitattributes", "content": ""}}])
        self.reply({"url": f"{self.hub.url}/{repo_id}", "name": repo_id, "id": repo_id})

    @route("POST", "/api/models/REPO/branch/ONE")
    def branch(self, repo_id: str, name: str) -> None:
        refs = self.repo(repo_id, write=True).refs
        if name in refs:
            raise Failure(409, "Reference already exists")
        refs[name] = refs["main"]
        self.reply({})

    @route("GET", "/api/models/REPO/refs")
    def refs(self, repo_id: str) -> None:
        refs = self.repo(repo_id).refs
        branches = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": c} for n, c in refs.items() if "/" not in n]
        self.reply({"branches": branches, "converts": [], "tags": []})

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self) -> None:
        """The Hub refuses a `base_model` that cannot be the id of a model."""
        text = json.loads(self.body)["content"]
        metadata = yaml.safe_load(text.split("---")[1]) if text.startswith("---") else None
        models = (metadata or {}).get("base_model", [])
        models = models if isinstance(models, list) else [models]
        bad = [model for model in models if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(model))]
        errors = [{"message": f'"base_model" with value {model!r} is not valid'} for model in bad]
        self.reply({"errors": errors, "warnings": []}, 400 if bad else 200)

    # upload

    @route("POST", "/api/models/REPO/preupload/ONE")
    def preupload(self, repo_id: str, revision: str) -> None:
        self.repo(repo_id, write="create_pr" not in self.query)
        _, tree = self.tree(repo_id, revision)
        self.reply({"files": [
            {
                **{"path": file["path"], "shouldIgnore": False},
                "oid": (tree[file["path"]].sha256 or tree[file["path"]].oid) if file["path"] in tree else None,
                "uploadMode": "lfs" if file["path"].endswith(LFS) or file["size"] > 10 << 20 else "regular",
            }
            for file in json.loads(self.body)["files"]
        ]})  # fmt: skip

    @route("POST", r"/REPO\.git/info/lfs/objects/batch")
    def lfs_batch(self, repo_id: str) -> None:
        self.repo(repo_id)
        objects = json.loads(self.body)["objects"]
        for file in objects:
            if file["oid"] not in self.hub.lfs:
                file["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{file['oid']}"}}
        self.reply({"transfer": "basic", "objects": objects})

    @route("PUT", "/lfs/ONE")
    def lfs_put(self, sha256: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != sha256:
            raise Failure(400, "the bytes do not have this SHA-256")
        self.hub.lfs[sha256] = self.body
        self.reply({})

    @route("GET", "/api/models/REPO/xet-(write|read)-token/ONE")
    def xet_token(self, repo_id: str, right: str, revision: str) -> None:
        self.repo(repo_id, write=right == "write" and "create_pr" not in self.query)
        token, expires = f"xet-{right}", int(time.time()) + 3600
        headers = {"X-Xet-Cas-Url": self.hub.url, "X-Xet-Access-Token": token, "X-Xet-Token-Expiration": str(expires)}
        self.reply({"accessToken": token, "exp": expires, "casUrl": self.hub.url}, headers=headers)

    @route("POST", "/v1/xorbs/default/ONE")
    def xorb_put(self, xorb: str) -> None:
        new = xorb not in self.hub.store.xorbs
        self.hub.store.xorbs[xorb] = self.body
        self.reply({"was_inserted": new})

    @route("POST", "/v1/shards")  # hf_xet asks for /v2/shards first, and takes a 404 for "not here"
    def shard_put(self) -> None:
        self.hub.store.put_shard(self.body)
        self.reply({"result": 1})

    @route("POST", "/api/models/REPO/commit/ONE")
    def commit(self, repo_id: str, revision: str) -> None:
        pull_request = "create_pr" in self.query
        self.signed_in()
        repo = self.repo(repo_id, write=not pull_request)
        if revision not in repo.refs:
            raise Failure(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        number = 1 + sum(name.startswith("refs/pr/") for name in repo.refs)
        target = f"refs/pr/{number}" if pull_request else revision
        sha = self.hub.commit(repo, revision, target, [json.loads(line) for line in self.body.splitlines() if line])
        answer = {"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{repo_id}/commit/{sha}"}
        if pull_request:
            answer["pullRequestUrl"] = f"{self.hub.url}/{repo_id}/discussions/{number}"
        self.reply(answer)

    # download

    @route("GET HEAD", "/REPO/resolve/ONE/REST")
    def resolve(self, repo_id: str, revision: str, path: str) -> None:
        sha, tree = self.tree(repo_id, revision)
        if path not in tree:
            return self.reply(b"", 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
        blob = tree[path]
        headers = {"X-Repo-Commit": sha, "ETag": f'"{blob.sha256 or blob.oid}"'}
        if xet := self.hub.store.by_sha256.get(blob.sha256 or ""):
            link = f"{self.hub.url}/api/models/{repo_id}/xet-read-token/{sha}"
            headers |= {"X-Xet-Hash": xet, "Link": f'<{link}>; rel="xet-auth"'}
        self.reply(b"" if self.command == "HEAD" else self.hub.read(blob), headers=headers, length=blob.size)

    @route("GET", "/(v1|v2)/reconstructions/ONE")
    def reconstruction(self, version: str, file: str) -> None:
        part = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        first, last = (int(part[1]), int(part[2])) if part else (0, 1 << 62)
        answer = self.hub.store.reconstruction(file, first, last, self.hub.url, version)
        if not answer["terms"]:
            raise Failure(416, "range not satisfiable")
        self.reply(answer)

    @route("GET", "/xorb/ONE")
    def xorb_get(self, xorb: str) -> None:
        self.reply(self.hub.store.xorbs[xorb])

    @route("GET", "/api/models/REPO(?:/revision/ONE)?")
    def info(self, repo_id: str, revision: str = "main") -> None:
        sha, tree = self.tree(repo_id, revision)
        siblings = [{"rfilename": path} for path in sorted(tree)]
        private = self.hub.repos[repo_id].private
        self.reply({"id": repo_id, "sha": sha, "private": private, "tags": [], "siblings": siblings})

    @route("GET", "/api/models/REPO/tree/ONE")
    def list_tree(self, repo_id: str, revision: str) -> None:
        _, tree = self.tree(repo_id, revision)
        self.reply([self.entry(path, blob) for path, blob in sorted(tree.items())])

    @route("POST", "/api/models/REPO/paths-info/ONE")
    def paths_info(self, repo_id: str, revision: str) -> None:
        _, tree = self.tree(repo_id, revision)
        form = self.body.startswith(b"{")
        paths = json.loads(self.body)["paths"] if form else parse_qs(self.body.decode())["paths"]
        self.reply([self.entry(path, tree[path]) for path in paths if path in tree])

    def entry(self, path: str, blob: Blob) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": path, "oid": blob.oid, "size": blob.size}
        if blob.sha256:
            entry["lfs"] = {"oid": blob.sha256, "size": blob.size, "pointerSize": 130}
        if xet := self.hub.store.by_sha256.get(blob.sha256 or ""):
            entry["xetHash"] = xet
        return entry
