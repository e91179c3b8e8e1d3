"""A hub on this machine: the part of its interface that fetching a repository's files takes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def digest(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


@contextlib.contextmanager
def serve_hub(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Serve a folder as any repository; gives the names of the files that were fetched, as they are.

    Parameters
    ----------
    folder : Path
        Files of the repository, in subfolders too.
    cache : Path
        Of this hub, in place of the user's.
    monkeypatch : pytest.MonkeyPatch
    """
    fetched: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, body: bool) -> None:
            path = self.path.partition("?")[0]
            if "/org/name/" not in path:
                self.send_error(404)
                return
            headers = {"X-Repo-Commit": COMMIT}
            if path.startswith("/api/models/"):
                content = json.dumps(self._listing("/tree/" in path)).encode()
            else:
                name = re.sub(r"^/[^/]+/[^/]+/resolve/[^/]+/", "", path)
                content = (folder / name).read_bytes()
                headers["ETag"] = f'"{digest(folder / name)}"'
                if body:
                    fetched.append(name)
            self.send_response(200)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if body:
                self.wfile.write(content)

        def _listing(self, tree: bool) -> Any:
            files = sorted(file for file in folder.rglob("*") if file.is_file())
            if tree:
                return [
                    {
                        "type": "file",
                        "path": str(file.relative_to(folder)),
                        "size": file.stat().st_size,
                        "oid": digest(file),
                    }
                    for file in files
                ]
            siblings = [{"rfilename": str(file.relative_to(folder))} for file in files]
            return {"id": "org/name", "sha": COMMIT, "siblings": siblings}

        def log_message(self, format: str, *args: object) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    try:
        yield fetched
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
