"""The two calls of S3 that Arrow lacks: put if absent, and delete (Arrow's leaves an object for the folder behind).

Credentials, region and endpoint come from the same environment as Arrow's: AWS_ENDPOINT_URL, AWS_PROFILE and so on.
Every error is an OSError in one line with the storage's code, for :meth:`sm_train.data.remote.Remote.retried`.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable
from typing import Any

_CONNECT_S, _SILENT_S = 5, 10


class NotSupported(Exception):
    """The storage knows no conditional put."""


def put_new(path: str, data: bytes) -> bool:
    """Put BUCKET/KEY unless it is there; whether it was put. Of two at once, one is.

    Raises:
        NotSupported: the storage answers that it does not implement this.
    """
    bucket, _, key = path.partition("/")
    code = _call(lambda client: client.put_object(Bucket=bucket, Key=key, Body=data, IfNoneMatch="*"))
    if code in ("NotImplemented", "501"):
        raise NotSupported
    if code not in ("", "PreconditionFailed", "412"):
        raise OSError(f"AWS Error {_name(code)} during PutObject with If-None-Match")
    return not code


def delete(path: str) -> None:
    """Delete BUCKET/KEY; nothing happens where there is none."""
    bucket, _, key = path.partition("/")
    if code := _call(lambda client: client.delete_object(Bucket=bucket, Key=key)):
        raise OSError(f"AWS Error {_name(code)} during DeleteObject")


def _call(what: Callable[[Any], object]) -> str:
    """The storage's error code, or nothing."""
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError

    try:
        what(_client(os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")))
    except ClientError as error:
        return str(error.response.get("Error", {}).get("Code") or "unknown")
    except NoCredentialsError:
        return "NoCredentials"
    except BotoCoreError as error:
        raise OSError(str(error)) from None
    return ""


@functools.cache
def _client(endpoint: str | None) -> Any:
    import boto3
    from botocore.config import Config

    settings = Config(connect_timeout=_CONNECT_S, read_timeout=_SILENT_S, retries={"total_max_attempts": 1})
    return boto3.Session().client("s3", endpoint_url=endpoint, config=settings)


def _name(code: str) -> str:
    """A code as Arrow writes it: NO_SUCH_BUCKET for NoSuchBucket."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", code).upper()
