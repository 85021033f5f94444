"""A hub on this machine: the HTTP interface of huggingface.co, over repositories in memory.

The real clients talk to it: `huggingface_hub`, `hf_xet`, `datasets`, `transformers`, `hf`. It
answers as the hub does: files of LFS come from a second address behind a redirect, a gated
repository shows its list of files and withholds their contents, and a repository that is private
or absent looks the same to those without access.
"""

import base64
import dataclasses
import hashlib
import http.server
import json
import re
import threading
import time
import urllib.parse
from collections.abc import Callable, Mapping
from typing import Any, Self

import yaml

LFS_SUFFIXES = (".safetensors", ".bin", ".msgpack", ".parquet", ".gz", ".npz", ".gguf")
API = r"/api/(?P<kind>models|datasets)/(?P<name>[^/]+/[^/]+)"
NOT_FOUND = "Repository not found"


@dataclasses.dataclass
class Repository:
    """Contents of a repository at each commit.

    Attributes:
      commits: Files by path, for each commit.
      refs: Commit of each branch and tag.
      gated: Accounts that were granted access; None for a repository that is not gated.
      private: Whether others than the owner may not see it.
    """

    commits: dict[str, dict[str, bytes]] = dataclasses.field(default_factory=dict)
    refs: dict[str, str] = dataclasses.field(default_factory=dict)
    gated: frozenset[str] | None = None
    private: bool = False

    def commit(self, files: Mapping[str, bytes], branch: str = "main") -> str:
        """Make a commit of files, which replace all others, and return its SHA."""
        text = repr([(path, oid(data)) for path, data in sorted(files.items())])
        sha = hashlib.sha1(f"{text} {len(self.commits)}".encode()).hexdigest()
        self.commits[sha] = dict(files)
        self.refs[branch] = sha
        return sha


@dataclasses.dataclass
class Fault:
    """A fault of the next requests whose method and path match a pattern.

    Attributes:
      pattern: Regular expression for "METHOD PATH".
      times: Number of requests that are still to fail.
      status: Status to answer; 0 to send half of the body and close the connection.
    """

    pattern: str
    times: int
    status: int


def oid(data: bytes) -> str:
    """Return the name of contents in git."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def sha256(data: bytes) -> str:
    """Return the name of contents in LFS."""
    return hashlib.sha256(data).hexdigest()


class Refused(Exception):
    """An answer other than success."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        self.status, self.message, self.code = status, message, code
        super().__init__(message)


class LocalHub:
    """A hub at an address of its own, for as long as the context lasts.

    Attributes:
      url: Address of the hub.
      storage: Address of what lies in LFS.
      repositories: Repositories by kind ("models" or "datasets") and name.
      accounts: What `whoami` says of each token.
      faults: Faults that are still to come.
      requests: Every request so far, as "METHOD PATH", with " bytes=..." where it asked for a part.
      objects: Contents in LFS by SHA-256.
      xet: Where hf_xet keeps its chunks, "local://DIRECTORY"; empty: nothing is kept by xet.
    """

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.accounts: dict[str, dict[str, Any]] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.objects: dict[str, bytes] = {}
        self.xet = ""
        self.closed = False
        self.lock = threading.RLock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        port = self._server.server_address[1]
        # Two hosts, as the hub has: the client follows a redirect to its own host at once.
        self.url, self.storage = f"http://127.0.0.1:{port}", f"http://localhost:{port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closed = True
        self._server.shutdown()
        self._server.server_close()

    def add(self, name: str, files: Mapping[str, bytes], kind: str = "models") -> Repository:
        """Add a repository with one commit on `main`."""
        repository = Repository()
        repository.commit(files)
        self.repositories[kind, name] = repository
        return repository

    def account(self, token: str, name: str, role: str = "write", **orgs: str) -> None:
        """Add an account: its token, the token's role, and its role in organisations."""
        self.accounts[token] = {
            "type": "user",
            "name": name,
            "orgs": [{"name": org, "roleInOrg": role} for org, role in orgs.items()],
            "auth": {"type": "access_token", "accessToken": {"role": role}},
        }

    def fail(self, pattern: str, times: int = 1, status: int = 503) -> None:
        """Let the next requests that match a pattern fail; status 0 cuts their bodies."""
        self.faults.append(Fault(pattern, times, status))

    def asked(self, pattern: str) -> int:
        """Return the number of requests so far that match a pattern."""
        return sum(bool(re.search(pattern, request)) for request in self.requests)


class _Handler(http.server.BaseHTTPRequestHandler):
    """Answers one request after the other of a connection."""

    hub: LocalHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing."""

    def _respond(self) -> None:
        if self.hub.closed:
            self.close_connection = True
            return
        self.body = self._read()
        url = urllib.parse.urlsplit(self.path)
        self.query = urllib.parse.parse_qs(url.query)
        request = f"{self.command} {url.path}"
        with self.hub.lock:
            part = self.headers.get("Range", "")
            self.hub.requests.append(f"{request} {part}".rstrip())
            fault = next(
                (f for f in self.hub.faults if f.times and re.search(f.pattern, request)), None
            )
            if fault:
                fault.times -= 1
            self.cut = fault is not None and fault.status == 0
            try:
                if fault and fault.status:
                    raise Refused(fault.status, "Service Unavailable")
                for method, pattern, answer in ROUTES:
                    match = re.fullmatch(pattern, url.path)
                    if match and self.command in method.split("|"):
                        named = {
                            k: urllib.parse.unquote(v or "") for k, v in match.groupdict().items()
                        }
                        return answer(self, **named)
                raise Refused(404, f"no such page: {request}")
            except Refused as e:
                headers = {"X-Error-Message": e.message, "X-Error-Code": e.code}
                self._json({"error": e.message}, e.status, {k: v for k, v in headers.items() if v})

    def _read(self) -> bytes:
        """Return the request's body, which may come in chunks."""
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    do_GET = do_HEAD = do_POST = do_PUT = _respond

    def _send(self, body: bytes, status: int = 200, headers: Mapping[str, str] = {}) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | dict(headers)).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.cut:
            self.close_connection = True
            body = body[: len(body) // 2]
        self.wfile.write(body)

    def _json(self, value: Any, status: int = 200, headers: Mapping[str, str] = {}) -> None:
        self._send(
            json.dumps(value).encode(), status, {"Content-Type": "application/json", **headers}
        )

    def _account(self) -> dict[str, Any] | None:
        """Return the account of the request's token; None without a token."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.accounts:
            raise Refused(401, "Invalid credentials in Authorization header")
        return self.hub.accounts.get(token)

    def _owns(self, name: str) -> bool:
        """Return True if the request's token may write a repository of this name."""
        account, owner = self._account(), name.split("/")[0]
        if account is None or account["auth"]["accessToken"]["role"] == "read":
            return False
        orgs = {org["name"] for org in account["orgs"] if org["roleInOrg"] != "read"}
        return owner == account["name"] or owner in orgs

    def _repository(self, kind: str, name: str) -> Repository:
        self._account()  # a token that is wrong is refused everywhere
        repository = self.hub.repositories.get((kind, name))
        if repository is None or (repository.private and not self._owns(name)):
            if self._account() is None:
                raise Refused(401, "Invalid username or password.")
            raise Refused(404, NOT_FOUND, "RepoNotFound")
        return repository

    def _files(self, kind: str, name: str, revision: str) -> tuple[str, dict[str, bytes]]:
        """Return the commit of a revision, and its files."""
        repository = self._repository(kind, name)
        sha = repository.refs.get(revision or "main", revision)
        if sha not in repository.commits:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha, repository.commits[sha]

    def whoami(self) -> None:
        account = self._account()
        if account is None:
            raise Refused(401, "Invalid username or password.")
        self._json(account)

    def info(self, kind: str, name: str, revision: str) -> None:
        sha, files = self._files(kind, name, revision)
        repository = self.hub.repositories[kind, name]
        siblings: list[dict[str, Any]] = [{"rfilename": path} for path in files]
        if "blobs" in self.query:
            for sibling, (path, data) in zip(siblings, files.items(), strict=True):
                entry = _entry(path, data)
                sibling |= {"size": len(data), "blobId": entry["oid"]}
                if "lfs" in entry:
                    sibling["lfs"] = {"sha256": sha256(data), "size": len(data), "pointerSize": 134}
        gated = "manual" if repository.gated is not None else False
        times = dict.fromkeys(("lastModified", "createdAt"), "2026-01-01T00:00:00.000Z")
        self._json(
            {"_id": "0" * 24, "id": name, "sha": sha, "siblings": siblings, "gated": gated}
            | {"private": repository.private, "tags": [], "downloads": 0, "likes": 0}
            | times
        )

    def tree(self, kind: str, name: str, revision: str, folder: str) -> None:
        _, files = self._files(kind, name, revision)
        recursive = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        start = f"{folder}/" if folder else ""
        below = {path: data for path, data in files.items() if path.startswith(start)}
        if not below:
            raise Refused(404, f"{folder} does not exist", "EntryNotFound")
        entries: dict[str, dict[str, Any]] = {}
        for path, data in below.items():
            inner = path.removeprefix(start).split("/")
            for depth in range(1, len(inner)):
                parent = start + "/".join(inner[:depth])
                if depth == 1 or recursive:
                    entries[parent] = {
                        "type": "directory",
                        "path": parent,
                        "oid": "0" * 40,
                        "size": 0,
                    }
            if len(inner) == 1 or recursive:
                entries[path] = _entry(path, data)
        self._json(list(entries.values()))

    def paths_info(self, kind: str, name: str, revision: str) -> None:
        _, files = self._files(kind, name, revision)
        if "json" in self.headers.get("Content-Type", ""):
            paths = json.loads(self.body)["paths"]
        else:
            paths = urllib.parse.parse_qs(self.body.decode())["paths"]
        self._json([_entry(path, files[path]) for path in paths if path in files])

    def resolve(self, kind: str | None, name: str, revision: str, path: str) -> None:
        kind = "datasets" if kind else "models"
        sha, files = self._files(kind, name, revision)
        self._check_access(self.hub.repositories[kind, name], name)
        if path not in files:
            raise Refused(404, "Entry not found", "EntryNotFound")
        data = files[path]
        headers = {"X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        if not path.endswith(LFS_SUFFIXES):
            return self._contents(data, headers | {"ETag": f'"{oid(data)}"'})
        name = sha256(data)
        self.hub.objects[name] = data
        linked = {"X-Linked-Etag": f'"{name}"', "X-Linked-Size": str(len(data))}
        return self._send(
            b"", 302, headers | linked | {"Location": f"{self.hub.storage}/lfs/{name}"}
        )

    def _check_access(self, repository: Repository, name: str) -> None:
        if repository.gated is None:
            return
        account = self._account()
        message = f"Access to model {name} is restricted"
        if account is None:
            raise Refused(401, f"{message}. You must be authenticated.", "GatedRepo")
        if account["name"] not in repository.gated:
            raise Refused(403, f"{message} and you are not in the authorized list.", "GatedRepo")

    def download(self, name: str) -> None:
        self._contents(self.hub.objects[name], {"ETag": f'"{name}"', "Accept-Ranges": "bytes"})

    def _contents(self, data: bytes, headers: Mapping[str, str]) -> None:
        """Send contents, or the part that the request asks for."""
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not part or int(part[1]) >= len(data):
            return self._send(data, 200, headers)
        start, end = int(part[1]), int(part[2] or len(data) - 1)
        where = {"Content-Range": f"bytes {start}-{end}/{len(data)}"}
        return self._send(data[start : end + 1], 206, {**headers, **where})

    def create(self) -> None:
        wanted = json.loads(self.body)
        account = self._account()
        name = f"{wanted.get('organization') or (account or {}).get('name')}/{wanted['name']}"
        if not self._owns(name):
            raise Refused(403, f"You don't have the rights to create a model under {name}")
        if ("models", name) in self.hub.repositories:
            return self._json({"url": f"{self.hub.url}/{name}"}, 409)
        repository = self.hub.add(name, {".gitattributes": b"*.safetensors filter=lfs\n"})
        repository.private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        return self._json({"url": f"{self.hub.url}/{name}", "id": name, "name": name})

    def validate(self) -> None:
        errors = card_errors(json.loads(self.body)["content"])
        self._json({"errors": [{"message": e} for e in errors]}, 400 if errors else 200)

    def _writable(self, kind: str, name: str) -> Repository:
        repository = self._repository(kind, name)
        if not self._owns(name):
            raise Refused(403, f"you may not write to {name}")
        return repository

    def preupload(self, kind: str, name: str, revision: str) -> None:
        files = self._writable(kind, name).commits[self._files(kind, name, revision)[0]]
        modes = []
        for file in json.loads(self.body)["files"]:
            mode = "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular"
            entry = {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}
            if file["path"] in files:
                data = files[file["path"]]
                entry["oid"] = sha256(data) if mode == "lfs" else oid(data)
            modes.append(entry)
        self._json({"files": modes})

    def batch(self, kind: str | None, name: str) -> None:
        self._writable("datasets" if kind else "models", name)
        objects = json.loads(self.body)["objects"]
        for entry in objects:
            if entry["oid"] not in self.hub.objects:
                href = f"{self.hub.storage}/lfs/{entry['oid']}"
                entry["actions"] = {"upload": {"href": href, "header": {}}}
        self._json({"transfer": "basic", "objects": objects})

    def upload(self, name: str) -> None:
        if sha256(self.body) != name:
            raise Refused(400, "contents do not have that SHA-256")
        self.hub.objects[name] = self.body
        self._send(b"")

    def xet_token(self, kind: str, name: str, access: str, revision: str) -> None:
        if access == "write":
            self._writable(kind, name)
        expires = int(time.time()) + 3600
        token = {"accessToken": "xet", "casUrl": self.hub.xet, "exp": expires}
        names = ("X-Xet-Access-Token", "X-Xet-Cas-Url", "X-Xet-Token-Expiration")
        headers = dict(zip(names, map(str, token.values()), strict=True))
        self._json(token, 200, headers)

    def commit(self, kind: str, name: str, revision: str) -> None:
        repository = self._writable(kind, name)
        files = dict(repository.commits[self._files(kind, name, revision)[0]])
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                # Contents that went to xet stay there: what the hub holds is their name.
                files[value["path"]] = self.hub.objects.get(value["oid"], value["oid"].encode())
            elif item["key"] == "deletedFile":
                files.pop(value["path"], None)
        sha = repository.commit(files, revision or "main")
        self._json({"commitUrl": f"{self.hub.url}/{name}/commit/{sha}", "commitOid": sha})


def _entry(path: str, data: bytes) -> dict[str, Any]:
    """Return the entry of a file in a list of files."""
    entry: dict[str, Any] = {"type": "file", "path": path, "oid": oid(data), "size": len(data)}
    if path.endswith(LFS_SUFFIXES):
        entry["lfs"] = {"oid": sha256(data), "size": len(data), "pointerSize": 134}
    return entry


def card_errors(content: str) -> list[str]:
    """Return what the hub refuses in a card's metadata, as its documentation states the rules."""
    match = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
    if not match:
        return ["the card has no metadata"]
    data = yaml.safe_load(match[1])
    errors = []
    for name in [data[k] for k in ("base_model",) if k in data]:
        for model in name if isinstance(name, list) else [name]:
            if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(model)):
                errors.append(f'"base_model" with value "{model}" is not valid. Use a model id')
    if data.get("license") == "other" and not data.get("license_link"):
        errors.append('"license_link" is missing for "license: other"')
    languages = data.get("language", [])
    for language in languages if isinstance(languages, list) else [languages]:
        if not re.fullmatch(r"[a-z]{2,3}(-[A-Za-z]+)?|code|multilingual", str(language)):
            errors.append(f'"language[0]" must only contain lowercase characters: {language}')
    if data.get("pipeline_tag") not in (None, "text-generation"):
        errors.append(f'"pipeline_tag" {data["pipeline_tag"]} is not known')
    if not all(isinstance(tag, str) for tag in data.get("tags", [])):
        errors.append('"tags" must be strings')
    return errors


# Methods, pattern of the path, and what answers.
ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("GET", r"/api/whoami-v2", _Handler.whoami),
    ("POST", r"/api/repos/create", _Handler.create),
    ("POST", r"/api/validate-yaml", _Handler.validate),
    ("GET", API + r"(/revision/(?P<revision>[^/]+))?", _Handler.info),
    ("GET", API + r"/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?", _Handler.tree),
    ("POST", API + r"/paths-info/(?P<revision>[^/]+)", _Handler.paths_info),
    ("POST", API + r"/preupload/(?P<revision>[^/]+)", _Handler.preupload),
    ("POST", API + r"/commit/(?P<revision>[^/]+)", _Handler.commit),
    ("GET", API + r"/xet-(?P<access>read|write)-token/(?P<revision>[^/]+)", _Handler.xet_token),
    ("GET|HEAD", r"/lfs/(?P<name>\w+)", _Handler.download),
    ("PUT", r"/lfs/(?P<name>\w+)", _Handler.upload),
    (
        "POST",
        r"/(?P<kind>datasets/)?(?P<name>[^/]+/[^/]+)\.git/info/lfs/objects/batch",
        _Handler.batch,
    ),
    (
        "GET|HEAD",
        r"/(?P<kind>datasets/)?(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)",
        _Handler.resolve,
    ),
]
