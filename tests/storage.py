"""A storage with S3's interface on this machine, for tests of remote sets; and a bad connection to it."""

from __future__ import annotations

import hashlib
import http.client
import os
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib import request

import pytest
from pyarrow import fs

from tests.training import free_port


@contextmanager
def s3_server(patch: pytest.MonkeyPatch) -> Iterator[fs.S3FileSystem]:
    """A moto server with the empty bucket ``bucket``; this process's environment points every S3 client to it."""
    import logging

    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", free_port(), verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
    }.items():  # fmt: skip
        patch.setenv(name, value)
    try:
        request.urlopen(
            f"http://{host}:{port}/moto-api/reset", data=b""
        ).close()  # all servers of a process share state
        storage = fs.S3FileSystem(endpoint_override=f"http://{host}:{port}", allow_bucket_creation=True)
        storage.create_dir("bucket")
        yield storage
    finally:
        server.stop()


def upload(storage: fs.S3FileSystem, folder: Path, to: str) -> None:
    """Put every file of a folder under a prefix."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with storage.open_output_stream(f"{to}/{path.relative_to(folder).as_posix()}") as out:
            out.write(path.read_bytes())


def objects(storage: fs.S3FileSystem, prefix: str) -> dict[str, str]:
    """The SHA-256 of every object below a prefix, by name, those of folders among them."""
    import boto3

    bucket, _, base = prefix.partition("/")
    client = boto3.client("s3")
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=f"{base}/")
    names = [found["Key"] for page in pages for found in page.get("Contents", ())]
    bodies = ((name, client.get_object(Bucket=bucket, Key=name)["Body"].read()) for name in names)
    return {name.removeprefix(f"{base}/"): hashlib.sha256(body).hexdigest() for name, body in bodies}


Plan = Callable[[str, str], str]
"""What befalls a request, by its method and path: "", 500, 503, slow, cut_up or cut_down."""
FAULTS = ("500", "503", "slow", "cut_up", "cut_down")


def at_random(seed: int, share: float) -> tuple[Plan, Counter[str]]:
    """A plan that lets a share of all requests fail, and a count of how."""
    rng, lock, count = random.Random(seed), threading.Lock(), Counter[str]()

    def plan(method: str, path: str) -> str:
        with lock:
            fault = rng.choice(FAULTS) if rng.random() < share else ""
            count[fault] += 1
            return fault

    return plan, count


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, behind: str, plan: Plan) -> None:
        super().__init__(("127.0.0.1", 0), _Proxy)
        self.behind, self.plan = behind, plan


class _Proxy(BaseHTTPRequestHandler):
    """Passes a request on, or does it the harm that the server's plan says."""

    server: _Server
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def handle_one(self) -> None:
        fault = self.server.plan(self.command, self.path)
        if fault == "cut_up":
            is_chunked = self.headers.get("transfer-encoding") == "chunked"
            size = int(self.rfile.readline(), 16) if is_chunked else int(self.headers.get("content-length") or 0)
            self.rfile.read(size // 2)
            return self.hang_up()
        body = self.body()
        if fault in ("500", "503"):
            code = {"500": "InternalError", "503": "SlowDown"}[fault]
            text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>injected</Message></Error>".encode()
            return self.answer(int(fault), [("Content-Type", "application/xml")], text, len(text))
        if fault == "slow":
            time.sleep(0.3)
        there = http.client.HTTPConnection(self.server.behind, timeout=30)
        drop = ("transfer-encoding", "content-length", "expect", "connection")
        headers = {name: value for name, value in self.headers.items() if name.lower() not in drop}
        there.request(self.command, self.path, body or None, {**headers, "Content-Length": str(len(body))})
        response = there.getresponse()
        data = response.read()
        there.close()
        if fault == "cut_down" and not data:
            return self.hang_up()  # it was done, and nobody hears of it
        kept = data[: len(data) // 2] if fault == "cut_down" else data
        self.answer(response.status, response.getheaders(), kept, len(data))
        if fault == "cut_down":
            self.hang_up()

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_one

    def body(self) -> bytes:
        if self.headers.get("transfer-encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("content-length") or 0))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def answer(self, status: int, headers: list[tuple[str, str]], data: bytes, length: int) -> None:
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in ("content-length", "connection", "transfer-encoding"):
                self.send_header(name, value)
        given = next((value for name, value in headers if name.lower() == "content-length"), str(length))
        self.send_header("Content-Length", given if self.command == "HEAD" else str(length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def hang_up(self) -> None:
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True

    def handle(self) -> None:
        try:
            super().handle()
        except (OSError, ValueError):  # the other side hung up
            self.close_connection = True


@contextmanager
def bad_connection(patch: pytest.MonkeyPatch, plan: Plan) -> Iterator[None]:
    """A proxy before the server of :func:`s3_server`, to which this process's environment then points."""
    proxy = _Server(os.environ["AWS_ENDPOINT_URL"].removeprefix("http://"), plan)
    thread = threading.Thread(target=proxy.serve_forever, daemon=True)
    thread.start()
    with patch.context() as inner:
        inner.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.server_port}")
        try:
            yield
        finally:
            proxy.shutdown()
            proxy.server_close()
            thread.join()
