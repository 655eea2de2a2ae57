"""A local stub of the Hub for uploads and downloads: repositories, LFS, commits, and faults on demand."""

import base64
import hashlib
import json
import re
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import yaml


REPO = "me/tiny"
TOKEN = "hf_stub"
DROP = "drop"  # a fault: the connection is lost in the middle of the request


def contents(folder):
    """Returns the files of a folder by path, in the form of `HubStub.files`."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


class HubStub:
    """
    A server thread; use it as a context manager.

    Attributes:
        files: Contents by repository and path. Commits change them.
        commits: Every commit as `(repository, message, paths)`.
        requests: Every request as `(method, path)`.
    """

    def __init__(self):
        self.files, self.commits, self.requests, self.blobs = {}, [], [], {}
        self.private = {}
        self._faults = []
        self._lock = threading.Lock()

    def fail(self, method, pattern, fault, times=1):
        """Makes the next `times` requests whose path matches `pattern` fail with an HTTP status or `DROP`."""
        self._faults += [[method, re.compile(pattern), fault]] * times

    def recover(self):
        self._faults.clear()

    def count(self, method, pattern):
        return sum(method == m and re.search(pattern, path) is not None for m, path in self.requests)

    def take_fault(self, method, path):
        with self._lock:
            self.requests.append((method, path))
            for index, (wanted, pattern, fault) in enumerate(self._faults):
                if wanted == method and pattern.search(path):
                    del self._faults[index]
                    return fault
        return None

    def __enter__(self):
        handler = type("Handler", (_Handler,), {"stub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc):
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    # ------------------------------------------------------------------ what the Hub does

    def create(self, body):
        name = f"{body.get('organization') or 'me'}/{body['name']}"
        if name in self.files:
            return 409, {"error": "You already created this model repo", "url": f"{self.endpoint}/{name}"}
        self.files[name], self.private[name] = {}, body.get("visibility") == "private"
        return 200, {"url": f"{self.endpoint}/{name}", "name": name, "id": name}

    def validate(self, body):
        """Checks the rules of the Hub that our model card could break."""
        errors = []
        match = re.match(r"---\n(.*?)\n---\n", body["content"], re.DOTALL)
        data = yaml.safe_load(match[1]) if match else {}
        for index, model in enumerate(data.get("model-index", [])):
            if not isinstance(model.get("name"), str):
                errors.append(f'"model-index[{index}].name" is required')
            for result in model.get("results", []):
                if not {"type"} <= set(result.get("task", {})) or not {"type", "name"} <= set(
                    result.get("dataset", {})
                ):
                    errors.append(f'"model-index[{index}].results" lacks a task or a dataset')
                if not all({"type", "value"} <= set(metric) for metric in result.get("metrics", [{}])):
                    errors.append(f'"model-index[{index}].results.metrics" lacks a type or a value')
        for key in ("library_name", "pipeline_tag", "license"):
            if key in data and not isinstance(data[key], str):
                errors.append(f'"{key}" must be a string')
        if data.get("license") == "not-a-licence":
            errors.append('"license" must be one of [apache-2.0, mit, ...]')
        for key in ("tags", "datasets"):
            if key in data and not all(isinstance(value, str) for value in data[key]):
                errors.append(f'"{key}" must be a list of strings')
        if isinstance(data.get("base_model"), str) and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", data["base_model"]):
            errors.append('"base_model" must be a model id')
        answer = {"errors": [{"message": text} for text in errors], "warnings": []}
        return (400 if errors else 200), answer

    def preupload(self, name, body):
        files = []
        for file in body["files"]:
            lfs = file["path"].endswith((".safetensors", ".bin", ".png"))
            stored = self.files[name].get(file["path"])
            oid = None
            if stored is not None:
                head = f"blob {len(stored)}\0".encode()
                oid = hashlib.sha256(stored).hexdigest() if lfs else hashlib.sha1(head + stored).hexdigest()
            mode = "lfs" if lfs else "regular"
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return 200, {"files": files}

    def lfs_batch(self, body):
        objects = []
        for wanted in body["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.blobs:
                entry["actions"] = {
                    "upload": {"href": f"{self.endpoint}/lfs/{wanted['oid']}"},
                    "verify": {"href": f"{self.endpoint}/lfs-verify"},
                }
            objects.append(entry)
        return 200, {"transfer": "basic", "objects": objects}

    def commit(self, name, lines, create_pr):
        header, *operations = [json.loads(line) for line in lines.splitlines()]
        changed, deleted = {}, []
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                changed[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                if value["oid"] not in self.blobs:
                    return 400, {"error": f"the LFS object of {value['path']} is missing"}
                changed[value["path"]] = self.blobs[value["oid"]]
            elif operation["key"] == "deletedFile":
                deleted.append(value["path"])
            else:
                return 400, {"error": f"unknown operation {operation['key']}"}
        if not create_pr:
            self.files[name].update(changed)
            for path in deleted:
                del self.files[name][path]
        self.commits.append((name, header["value"]["summary"], changed))
        oid = hashlib.sha1(lines).hexdigest()
        answer = {"commitUrl": f"{self.endpoint}/{name}/commit/{oid}", "commitOid": oid}
        return 200, answer | ({"pullRequestUrl": f"{self.endpoint}/{name}/discussions/1"} if create_pr else {})

    def head(self, name):
        """Returns the last commit of a repository. Equal content has an equal commit, as in git."""
        content = "".join(
            f"{path} {hashlib.sha1(file).hexdigest()}\n" for path, file in sorted(self.files[name].items())
        )
        return hashlib.sha1(content.encode()).hexdigest()

    def tree(self, name):
        return [
            {"type": "file", "path": path, "oid": hashlib.sha1(file).hexdigest(), "size": len(file)}
            for path, file in self.files[name].items()
        ]

    def download(self, name, path):
        files = self.files[name]
        commit = self.head(name) if files else "0" * 40
        if path not in files:
            return 404, {"error": f"no {path}"}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}
        content = files[path]
        return 200, content, {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'}


class _Handler(BaseHTTPRequestHandler):
    stub: HubStub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def _body(self):
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(self, status, body=b"", headers=None):
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _handle(self):
        fault = self.stub.take_fault(self.command, self.path)
        if fault == DROP:
            self.rfile.read(min(16, int(self.headers.get("Content-Length") or 0)))
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        body = self._body()
        if fault is not None:
            self._answer(fault, {"error": f"made to fail with {fault}"})
            return
        path, _, query = self.path.partition("?")
        is_open = path == "/api/validate-yaml" or path.startswith("/lfs") or self.command in ("GET", "HEAD")
        if not is_open and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer(401, {"error": "Invalid credentials in Authorization header"})
            return
        self._answer(*self._route(path, query, body))

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def _route(self, path, query, body):
        stub, name = self.stub, r"(?P<name>[\w.-]+/[\w.-]+)"
        if path == "/api/repos/create":
            return stub.create(json.loads(body))
        if path == "/api/validate-yaml":
            return stub.validate(json.loads(body))
        if path == "/api/whoami-v2":
            return 200, {"name": "me", "type": "user"}
        if self.command == "PUT" and path.startswith("/lfs/"):
            oid = path.rpartition("/")[2]
            if hashlib.sha256(body).hexdigest() != oid:
                return 400, {"error": "the content does not have this hash"}
            stub.blobs[oid] = body
            return 200, b""
        if path == "/lfs-verify":
            wanted = json.loads(body)
            return (200 if len(stub.blobs.get(wanted["oid"], b"")) == wanted["size"] else 400), {}
        if match := re.fullmatch(rf"/{name}\.git/info/lfs/objects/batch", path):
            return stub.lfs_batch(json.loads(body))
        if match := re.fullmatch(rf"/api/models/{name}/preupload/(?P<revision>.+)", path):
            return stub.preupload(match["name"], json.loads(body))
        if match := re.fullmatch(rf"/api/models/{name}/commit/(?P<revision>.+)", path):
            return stub.commit(match["name"], body, "create_pr=1" in query)
        if (match := re.fullmatch(rf"/api/models/{name}(/revision/.+)?", path)) and match["name"] in stub.files:
            return 200, {"id": match["name"], "sha": stub.head(match["name"]), "siblings": []}
        if (match := re.fullmatch(rf"/api/models/{name}/tree/.+", path)) and match["name"] in stub.files:
            return 200, stub.tree(match["name"])
        match = re.fullmatch(rf"/{name}/resolve/[^/]+/(?P<file>.+)", path)
        if match and match["name"] in stub.files:
            return stub.download(match["name"], match["file"])
        return 404, {"error": f"nothing at {path}"}, {"X-Error-Code": "RepoNotFound"}
