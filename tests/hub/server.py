"""The part of the Hub's HTTP API that pushing and loading use, on the loopback interface.

It keeps what it is sent and checks it: the hashes and sizes of LFS objects, and that every LFS file of a commit was
uploaded before. Files over ten bytes that are not text go through LFS.
"""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubServer:
    """Runs a server while it is entered.

    Attributes:
        repos: repo id -> {path: bytes}, as committed.
        commits: repo id -> number of commits.
        requests: (method, path) of everything that was asked.
        fail: (method, part of a path) answered by 500.
        corrupt: whether stored LFS objects lose a byte before their hash is checked.
    """

    def __init__(self):
        self.repos, self.commits, self.objects, self.requests = {}, {}, {}, []
        self.fail, self.corrupt = None, False
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def environment(self, home):
        """Variables that make a process use this server, with a cache of its own."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_TOKEN": "test-token",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "0",
        }


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def log_message(self, *_):
        pass

    def reply(self, content, status=200, **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def read(self):
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def handle_any(self):
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        body = self.read()
        if self.hub.fail and self.command == self.hub.fail[0] and self.hub.fail[1] in path:
            return self.reply({"error": "the server is on fire"}, 500)
        parts = path.strip("/").split("/")
        if parts[0] == "objects":
            return self.store(parts[1], body)
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path == "/api/validate-yaml":
            return self.reply({"errors": [], "warnings": []})
        if path.endswith(".git/info/lfs/objects/batch"):
            return self.batch(json.loads(body))
        if parts[:2] == ["api", "models"]:
            repo = "/".join(parts[2:4])
            if repo not in self.hub.repos:
                return self.reply({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
            action = parts[4] if len(parts) > 4 else "info"
            return getattr(self, f"repo_{action}")(repo, body)
        if len(parts) > 3 and parts[2] == "resolve":
            return self.resolve("/".join(parts[:2]), "/".join(parts[4:]))
        return self.reply({"error": f"unknown request {self.command} {path}"}, 404)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any  # noqa: N815 - names of http.server

    def create(self, request):
        if self.headers.get("Authorization") != "Bearer test-token":
            return self.reply({"error": "Invalid credentials"}, 401)
        repo = f"{request.get('organization') or 'me'}/{request['name']}"
        self.hub.repos.setdefault(repo, {})
        return self.reply({"url": f"{self.hub.url}/{repo}", "name": repo})

    def repo_preupload(self, repo, body):
        def mode(file):
            text = b"\0" not in base64.b64decode(file.get("sample") or "")
            return "regular" if text or file["size"] <= 10 else "lfs"

        files = [
            {"path": f["path"], "uploadMode": mode(f), "shouldIgnore": False, "oid": None}
            for f in json.loads(body)["files"]
        ]
        return self.reply({"files": files})

    def batch(self, request):
        def entry(o):
            if o["oid"] in self.hub.objects:
                return o  # without actions there is nothing to upload
            return {**o, "actions": {"upload": {"href": f"{self.hub.url}/objects/{o['oid']}", "header": {}}}}

        return self.reply({"transfer": "basic", "objects": [entry(o) for o in request["objects"]]})

    def store(self, oid, body):
        body = body[:-1] if self.hub.corrupt else body
        if hashlib.sha256(body).hexdigest() != oid:
            return self.reply({"error": "hash mismatch"}, 400)
        self.hub.objects[oid] = body
        return self.reply({})

    def repo_commit(self, repo, body):
        files = {}
        for line in map(json.loads, body.decode().splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                content = self.hub.objects.get(value["oid"])
                if content is None or len(content) != value["size"]:
                    return self.reply({"error": f"object of {value['path']} was not uploaded"}, 400)
                files[value["path"]] = content
        self.hub.repos[repo].update(files)
        self.hub.commits[repo] = self.hub.commits.get(repo, 0) + 1
        url = f"{self.hub.url}/{repo}/commit/{COMMIT}"
        return self.reply({"success": True, "commitOid": COMMIT, "commitUrl": url})

    def repo_info(self, repo, _):
        siblings = [{"rfilename": path} for path in sorted(self.hub.repos[repo])]
        return self.reply(
            {"id": repo, "modelId": repo, "sha": COMMIT, "siblings": siblings, "tags": [], "private": False}
        )

    repo_revision = repo_info

    def repo_tree(self, repo, _):
        return self.reply(
            [
                {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for path, content in sorted(self.hub.repos[repo].items())
            ]
        )

    def resolve(self, repo, path):
        content = self.hub.repos.get(repo, {}).get(path)
        if content is None:
            return self.reply({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        return self.reply(content, ETag=etag, X_Repo_Commit=COMMIT, Accept_Ranges="bytes")
