"""A stand-in for the Hugging Face Hub: an HTTP server with the answers that pushing and loading gates needs.

Repositories live in memory. Large files (`.safetensors`) go through Git LFS: a batch, an upload, and at download a redirect to
another host. The Hub's other way for them, Xet, is not played: HF_HUB_DISABLE_XET turns it off.
"""

import base64
import contextlib
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

OWNER, READER = "hf_owner", "hf_reader"
"""Tokens: one may write below `owner/`, one may only read."""


@dataclass
class Repository:
    """Attributes: branches: name -> commit. commits: commit -> {file: content}. private: who may see it."""

    private: bool = False
    branches: dict = field(default_factory=dict)
    commits: dict = field(default_factory=dict)
    messages: list = field(default_factory=list)

    def commit(self, branch, files, message):
        content = {**self.commits.get(self.branches.get(branch), {}), **files}
        name = hashlib.sha1(f"{branch}{message}{len(self.commits)}".encode()).hexdigest()
        self.commits[name] = content
        self.branches[branch] = name
        self.messages.append(message)
        return name

    def find(self, revision):
        """The commit of a branch or of itself; None if there is none."""
        return self.branches.get(revision) or (revision if revision in self.commits else None)


class FakeHub:
    """Attributes: url; repositories: id -> Repository; asked: (method, path) of each request; refuses: of such -> status."""

    def __init__(self):
        self.repositories, self.large, self.asked, self.refuses = {}, {}, [], {}
        hub = self

        class Handler(_Handler):
            def __init__(self, *arguments):
                self.hub = hub
                super().__init__(*arguments)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def add(self, name, files, *, private=False):
        """Makes a repository with these files in `main`."""
        self.repositories[name] = Repository(private)
        return self.repositories[name].commit("main", files, "initial commit")


@contextlib.contextmanager
def serving():
    """A stand-in that answers within the block."""
    hub = FakeHub()
    thread = threading.Thread(target=hub.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        hub.server.shutdown()
        thread.join()
        hub.server.server_close()


class _Refusal(Exception):
    def __init__(self, status, code="", text=""):
        super().__init__(text)
        self.status, self.code = status, code


def _oid(data, mode):
    """What a file is compared by: of Git for a small one, of Git LFS for a large one."""
    if mode == "lfs":
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    ROUTES = (
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "validate"),
        ("GET", r"/api/models/([^/]+/[^/]+)", "info"),
        ("GET", r"/api/models/([^/]+/[^/]+)/revision/(.+)", "info"),
        ("POST", r"/api/models/([^/]+/[^/]+)/branch/(.+)", "branch"),
        ("POST", r"/api/models/([^/]+/[^/]+)/preupload/(.+)", "preupload"),
        ("POST", r"/api/models/([^/]+/[^/]+)/commit/(.+)", "commit"),
        ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", "batch"),
        ("PUT", r"/lfs/(\w+)", "upload"),
        ("POST", r"/lfs/verify", "verify"),
        ("GET", r"/lfs/(\w+)", "stored"),
        ("GET", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "resolve"),
    )

    def log_message(self, *arguments):
        pass

    def do(self):
        path = urlsplit(self.path).path
        self.hub.asked.append((self.command, path))
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        method = "GET" if self.command == "HEAD" else self.command
        try:
            if status := self.hub.refuses.get((self.command, path)):
                raise _Refusal(status)
            for verb, pattern, name in self.ROUTES:
                if verb == method and (match := re.fullmatch(pattern, path)):
                    getattr(self, name)(*map(unquote, match.groups()))
                    return
            raise _Refusal(404)
        except _Refusal as refusal:
            headers = {"X-Error-Code": refusal.code} if refusal.code else {}
            headers |= {"Retry-After": "7"} if refusal.status == 429 else {}
            message = {"X-Error-Message": str(refusal)} if str(refusal) else {}
            self.answer({"error": str(refusal)}, refusal.status, headers | message)

    do_GET = do_HEAD = do_POST = do_PUT = do

    def answer(self, content, status=200, headers=None):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    @property
    def token(self):
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def seen(self, name):
        """The repository, if the token may see it. To all others it is as if there were none: 401 without a token, else 404."""
        found = self.hub.repositories.get(name)
        if found is None or (found.private and self.token != OWNER):
            raise _Refusal(404 if self.token else 401, "RepoNotFound", "Repository not found")
        return found

    def may_write(self, name):
        if not self.token:
            raise _Refusal(401, text="Invalid username or password.")
        if self.token != OWNER or not name.startswith("owner/"):
            raise _Refusal(403, text="Forbidden: pass a token with write access")

    def create(self):
        asked = json.loads(self.body)
        name = f"{asked['organization']}/{asked['name']}"
        self.may_write(name)
        if name in self.hub.repositories:
            raise _Refusal(409, text="You already created this model repo")
        self.hub.add(name, {".gitattributes": b"*.safetensors filter=lfs"}, private=asked.get("visibility") == "private")
        self.answer({"url": f"{self.hub.url}/{name}"})

    def validate(self):
        text = json.loads(self.body)["content"]
        if not re.match(r"---\n.*?\n---\n", text, re.DOTALL):
            self.answer({"errors": [{"message": "no metadata"}], "warnings": []}, 400)
            return
        self.answer({"errors": [], "warnings": []})

    def info(self, name, revision="main"):
        found = self.seen(name)
        commit = found.find(revision)
        if commit is None:
            raise _Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files = [{"rfilename": file} for file in found.commits[commit]]
        self.answer({"id": name, "modelId": name, "sha": commit, "private": found.private, "siblings": files})

    def branch(self, name, branch):
        self.may_write(name)
        found = self.seen(name)
        found.branches[branch] = found.branches["main"]
        self.answer({})

    def preupload(self, name, revision):
        self.may_write(name)
        commit = self.seen(name).find(revision)
        if commit is None:
            raise _Refusal(404, "RevisionNotFound")
        held = self.seen(name).commits[commit]
        mode = lambda path: "lfs" if path.endswith(".safetensors") else "regular"
        paths = [each["path"] for each in json.loads(self.body)["files"]]
        oid = lambda path: {"oid": _oid(held[path], mode(path))} if path in held else {}
        self.answer({"files": [{"path": path, "uploadMode": mode(path), "shouldIgnore": False, **oid(path)} for path in paths]})

    def batch(self, name):
        self.may_write(name)
        wanted = json.loads(self.body)["objects"]
        href = lambda of: {"href": f"{self.hub.url}/lfs/{of}"}
        objects = [each | {"actions": {"upload": href(each["oid"]), "verify": href("verify")}} for each in wanted]
        self.answer({"transfer": "basic", "objects": objects})

    def upload(self, oid):
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.hub.large[oid] = self.body
        self.answer({})

    def verify(self):
        asked = json.loads(self.body)
        assert len(self.hub.large[asked["oid"]]) == asked["size"]
        self.answer({})

    def stored(self, oid):
        self.answer(self.hub.large[oid], headers={"ETag": f'"{oid}"'})

    def commit(self, name, revision):
        self.may_write(name)
        lines = [json.loads(line) for line in self.body.splitlines()]
        files = {}
        for line in lines[1:]:
            value = line["value"]
            content = {"file": lambda v: base64.b64decode(v["content"]), "lfsFile": lambda v: self.hub.large[v["oid"]]}
            files[value["path"]] = content[line["key"]](value)
        made = self.seen(name).commit(revision, files, lines[0]["value"]["summary"])
        self.answer({"success": True, "commitOid": made, "commitUrl": f"{self.hub.url}/{name}/commit/{made}"})

    def resolve(self, name, revision, file):
        found = self.seen(name)
        commit = found.find(revision)
        if commit is None:
            raise _Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if file not in found.commits[commit]:
            raise _Refusal(404, "EntryNotFound", "Entry not found")
        data = found.commits[commit][file]
        oid = hashlib.sha256(data).hexdigest()
        headers = {"X-Repo-Commit": commit, "ETag": f'"{oid}"'}
        if not file.endswith(".safetensors"):
            self.answer(data, headers=headers)
            return
        self.hub.large[oid] = data
        elsewhere = self.hub.url.replace("127.0.0.1", "localhost")
        linked = {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(data)), "Location": f"{elsewhere}/lfs/{oid}"}
        self.answer(b"", 302, headers | linked)
