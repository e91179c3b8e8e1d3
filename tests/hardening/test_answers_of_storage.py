"""An object storage that answers nonsense: what it said is told, and no bytes are blamed."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import icechunk
import pytest
from typer.testing import CliRunner

from tinyonn.cli import app
from tinyonn.errors import StoreDamagedError, StoreError
from tinyonn.store.faults import translated
from tinyonn.store.repository import Store

Answer = Callable[[BaseHTTPRequestHandler], None]
S3_ERROR = (
    "<?xml version='1.0'?><Error><Code>{code}</Code><Message>{text}</Message><RequestId>1</RequestId></Error>"
)


def said(status: int, body: bytes, kind: str = "application/xml", length: int | None = None) -> Answer:
    def answer(request: BaseHTTPRequestHandler) -> None:
        request.send_response(status)
        request.send_header("Content-Type", kind)
        request.send_header("Content-Length", str(len(body) if length is None else length))
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(body)
        request.close_connection = length is not None

    return answer


def raw(content: bytes) -> Answer:
    def answer(request: BaseHTTPRequestHandler) -> None:
        request.wfile.write(content)
        request.close_connection = True

    return answer


def error(status: int, code: str, text: str) -> Answer:
    return said(status, S3_ERROR.format(code=code, text=text).encode())


PAGE = b"<!DOCTYPE html><html><body>Please log in to the hotel's network</body></html>"
ANSWERS = {
    "a page for everything": said(200, PAGE, "text/html"),
    "garbage": raw(bytes(range(256)) * 4),
    "nothing": raw(b""),
    "garbage that is called fine": said(200, bytes(range(256)) * 4, "application/octet-stream"),
    "an empty answer": said(200, b""),
    "cut short": said(200, PAGE, "text/html", length=100_000),
    "a redirect": said(301, PAGE, "text/html"),
    "gone": said(410, PAGE, "text/html"),
    "forbidden": error(403, "AccessDenied", "Access Denied"),
    "forbidden by a page": said(403, PAGE, "text/html"),
    "a wrong key": error(403, "SignatureDoesNotMatch", "The signature does not match"),
    "an old token": error(400, "ExpiredToken", "The provided token has expired"),
    "no such bucket": error(404, "NoSuchBucket", "The bucket does not exist"),
    "a fault of its own": error(500, "InternalError", "We encountered an internal error"),
    "a fault told by a page": said(502, PAGE, "text/html"),
    "too many requests": error(503, "SlowDown", "Reduce your request rate"),
    "half an XML": said(200, b"<?xml version='1.0'?><ListBucketResult><Contents><Key>a</"),
}


@contextmanager
def serving(answer: Answer) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do(self) -> None:
            answer(self)

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = do

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def _keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")


PATIENT = (  # Icechunk asks again for half a minute
    "nothing",
    "a fault of its own",
    "a fault told by a page",
    "too many requests",
)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in PATIENT)) for name in ANSWERS]
)
def test_what_the_storage_says_is_not_blamed_on_bytes(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if name == "no such bucket" and icechunk.__version__ >= "2":
        pytest.skip("Icechunk 2 does not tell a bucket that is not there from one without a run")
    monkeypatch.chdir(tmp_path)
    with serving(ANSWERS[name]) as address:
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        for ask in (Store.exists, Store.open):
            with pytest.raises(StoreError) as caught:
                ask("s3://bucket/run/store")
            assert type(caught.value) is StoreError
            said_ = str(caught.value)
            assert "s3://bucket/run/store" in said_
            assert "checksum" not in said_ and "record" not in said_
            assert "check " in said_ and len(said_) < 600
            if name in PATIENT:
                break


def test_a_bucket_without_a_run_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(error(404, "NoSuchKey", "The specified key does not exist.")) as address:
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        assert not Store.exists("s3://bucket/run/store")


def test_the_command_says_it_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(ANSWERS["a page for everything"]) as address:
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        told = CliRunner().invoke(app, ["status", "s3://bucket/run"])
    assert told.exit_code == 4
    last = told.stderr.splitlines()[-1]
    assert re.match(r"tinyonn: .*s3://bucket/run/store: .*(is no S3|is no answer of S3)", last)


@pytest.mark.parametrize(
    ("cause", "kind"),
    [
        (
            'error getting object |-> service error `-> Error { code: "NoSuchKey", message: "no" }',
            StoreDamagedError,
        ),
        ("error getting object from object store |-> file not found", StoreDamagedError),
        ('|-> service error `-> Error { code: "SlowDown", message: "no" }', StoreError),
    ],
)
def test_bytes_that_are_gone_are_told_apart(cause: str, kind: type[Exception]) -> None:
    with pytest.raises(StoreError) as caught, translated("reading"):
        raise RuntimeError(cause)
    assert type(caught.value) is kind
