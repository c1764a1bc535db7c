"""A stand-in for a hub of data sets, on this machine: what the package `datasets` asks of one, over real HTTP."""

import contextlib
import hashlib
import http.server
import json
import os
import threading
import urllib.parse
from collections.abc import Iterator, Mapping

Files = Mapping[str, bytes]  # path in a repository -> content


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    branches: Mapping[tuple[str, str], Files]  # (repository, branch) -> what is in it

    def log_message(self, *arguments):
        """Nothing: a test's output is no access log."""

    def do_GET(self):
        self._answer({})

    do_HEAD = do_GET

    def do_POST(self):
        self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def _answer(self, body):
        # A branch comes with its slashes quoted.
        parts = [urllib.parse.unquote(part) for part in urllib.parse.urlparse(self.path).path.strip("/").split("/")]
        api = parts[0] == "api"
        name, rest = "/".join(parts[api + 1 : api + 3]), parts[api + 3 :]
        kind, branch, path = (rest[0] if rest else ""), (rest[1] if len(rest) > 1 else "main"), "/".join(rest[2:])
        found = next((b for b in self.branches if b[0] == name and branch in (b[1], commit(b))), None)
        if not parts[api].startswith("datasets") or found is None:
            code = "RevisionNotFound" if any(b[0] == name for b in self.branches) else "RepoNotFound"
            return self._send(404, {"error": "not here"}, {"X-Error-Code": code})
        files = self.branches[found]
        if kind == "resolve":
            if path not in files:
                headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit(found)}
                return self._send(404, {"error": "no such file"}, headers)
            return self._send(200, files[path], {"X-Repo-Commit": commit(found), "ETag": f'"{_sha(files[path])}"'})
        if kind == "tree":
            entries = [e for e in _entries(files) if e["path"].startswith(f"{path}/" if path else "")]
            if path and not entries:
                return self._send(404, {"error": "no such folder"}, {"X-Error-Code": "EntryNotFound"})
            return self._send(200, entries, {})
        if kind == "paths-info":
            return self._send(200, [e for e in _entries(files) if e["path"] in body["paths"]], {})
        if kind in ("", "revision"):
            about = {"id": name, "sha": commit(found), "private": False, "gated": False, "disabled": False, "tags": []}
            return self._send(200, about | {"siblings": [{"rfilename": path} for path in files]}, {})
        return self._send(404, {"error": "not here"}, {})

    def _send(self, status, content, headers):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _sha(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def commit(branch: tuple[str, str]) -> str:
    return _sha(repr(branch).encode())


def _entries(files: Files) -> list[dict]:
    folders = {parent for path in files for parent in _parents(path)}
    blobs = [{"type": "file", "path": path, "size": len(x), "oid": _sha(x)} for path, x in files.items()]
    return [
        {"type": "directory", "path": path, "size": 0, "oid": _sha(path.encode())} for path in sorted(folders)
    ] + blobs


def _parents(path: str) -> list[str]:
    parts = path.split("/")[:-1]
    return ["/".join(parts[: i + 1]) for i in range(len(parts))]


@contextlib.contextmanager
def hub(branches: Mapping[tuple[str, str], Files], home: os.PathLike) -> Iterator[dict[str, str]]:
    """Serves repositories; gives the environment of a process that takes this for the hub."""
    handler = type("Handler", (_Handler,), {"branches": branches})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
        }
    finally:
        server.shutdown()
        server.server_close()
