"""A storage with S3's interface on this machine, for tests of remote sets."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
