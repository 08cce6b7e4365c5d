"""A small Hugging Face hub on this machine: the endpoints that a push uses, with repositories in memory."""

import base64
import http.server
import json
import re
import threading
from contextlib import contextmanager
from urllib.parse import unquote, urlsplit


class Hub:
    """``repos``: name → {private, files: path → bytes, commits: [message]}; ``failures``: what commits answer next."""

    def __init__(self, token="hf_local"):
        self.token, self.role, self.user = token, "write", "me"
        self.repos, self.failures, self.commits_asked = {}, [], 0
        self.lfs = {}
        self.lock = threading.Lock()

    def answer(self, method, path, body, authorised):
        if method == "PUT" and (found := re.fullmatch(r"/lfs/(\w+)", path)):
            self.lfs[found[1]] = body
            return 200, {}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if not authorised:
            return 401, {"error": "Invalid credentials"}
        if path == "/api/whoami-v2":
            role = {"accessToken": {"role": self.role, "displayName": "test"}}
            return 200, {"type": "user", "name": self.user, "orgs": [{"name": "us"}], "auth": role}
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or self.user}/{asked['name']}"
            private = asked.get("private", asked.get("visibility") == "private")
            if name in self.repos:
                return 409, {"error": "You already created this model repo", "url": f"{self.url}/{name}"}
            self.repos[name] = {"private": bool(private), "files": {}, "commits": []}
            return 200, {"url": f"{self.url}/{name}", "name": name}
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(preupload|commit|revision)/main)?", path)
        if found and found[1] in self.repos:
            return self._repo(found[1], found[2], body)
        if found := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            objects = [
                {**each, "actions": {"upload": {"href": f"{self.url}/lfs/{each['oid']}", "header": {}}}}
                for each in json.loads(body)["objects"]
            ]
            return 200, {"transfer": "basic", "objects": objects}
        return 404, {"error": "Repository not found"}

    def _repo(self, name, action, body):
        repo = self.repos[name]
        if action == "preupload":
            asked = json.loads(body)["files"]
            files = [
                {
                    "path": each["path"],
                    "uploadMode": "lfs" if each["path"].endswith((".safetensors", ".png")) else "regular",
                    "shouldIgnore": False,
                }
                for each in asked
            ]
            return 200, {"files": files}
        if action == "commit":
            self.commits_asked += 1
            if self.failures:
                return self.failures.pop(0), {"error": "the hub has a bad day"}
            for line in map(json.loads, body.decode().splitlines()):
                value = line["value"]
                if line["key"] == "header":
                    repo["commits"].append(value["summary"])
                elif line["key"] == "file":
                    repo["files"][value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    repo["files"][value["path"]] = self.lfs[value["oid"]]
            commit = f"{len(repo['commits']):040x}"
            return 200, {"success": True, "commitOid": commit, "commitUrl": f"{self.url}/{name}/commit/{commit}"}
        about = {"id": name, "modelId": name, "sha": "0" * 40, "private": repo["private"], "tags": [], "siblings": []}
        return 200, about


@contextmanager
def local_hub(token="hf_local"):
    """A hub that runs; its address is ``hub.url``."""
    hub = Hub(token)

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self):
            if self.headers.get("Transfer-Encoding") == "chunked":
                body = b""
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
            else:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            authorised = self.headers.get("Authorization") == f"Bearer {hub.token}"
            with hub.lock:
                status, answer = hub.answer(self.command, unquote(urlsplit(self.path).path), body, authorised)
            content = json.dumps(answer).encode()
            self.send_response(status)
            if status >= 400:
                self.send_header("X-Error-Message", answer["error"])
            if status == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = do_HEAD = handle_any  # noqa: N815

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
