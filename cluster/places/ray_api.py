"""The HTTP of a Ray cluster's dashboard, asked with a bound on the time: does it answer, to us, and what has it."""

from __future__ import annotations

import json
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping
from http.client import HTTPException
from pathlib import Path

from sm_train.errors import UserError, printable

_PATIENCE_S = 10.0
_REMEDY = "set RAY_AUTH_TOKEN_PATH or RAY_AUTH_TOKEN; `ray get-auth-token`, on the cluster's head, prints it"


def token() -> str | None:
    """The token for the cluster, where Ray's own commands look for it.

    Raises:
        UserError: RAY_AUTH_TOKEN_PATH names no file that can be read.
    """
    if given := os.environ.get("RAY_AUTH_TOKEN"):
        return given.strip()
    path = os.environ.get("RAY_AUTH_TOKEN_PATH")
    file = Path(path or "~/.ray/auth_token").expanduser()
    try:
        return file.read_text().strip() or None
    except OSError as error:
        if path:
            raise UserError(f"RAY_AUTH_TOKEN_PATH is {path!r}, which cannot be read: {error.strerror}") from None
        return None


def headers() -> dict[str, str]:
    """What a request carries."""
    found = token()
    return {"Authorization": f"Bearer {found}"} if found else {}


def nodes(address: str) -> list[dict[str, float]]:
    """What each living node has in all, by the name of the resource.

    Raises:
        UserError: nobody answers there, or not to us.
    """
    if not address.startswith(("http://", "https://")):
        raise UserError(f"ray.address is {address!r}; give the dashboard's, as http://HOST:8265")
    own = headers()
    status, _ = _get(address, "/api/version", {})
    if status == 200:
        say = "warning: the cluster at {} takes jobs from anybody who reaches it; start it with RAY_AUTH_MODE=token"
        print(say.format(address), file=sys.stderr, flush=True)
    elif status in (401, 403) and not own:
        raise UserError(f"the cluster at {address} asks for a token, and none is here; {_REMEDY}")
    status, body = _get(address, "/api/v0/nodes?detail=1&limit=10000", own)
    if status in (401, 403):
        raise UserError(f"the cluster at {address} refuses the token ({status}); {_REMEDY}")
    try:
        found = json.loads(body)["data"]["result"]["result"]
        return [dict(node["resources_total"]) for node in found if node["state"] == "ALIVE"]
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{address} answers with {status} and {printable(body[:80].decode(errors='replace'))!r}, and not as a Ray "
            "dashboard; give its address with ray.address="
        ) from None


def _get(address: str, path: str, own: Mapping[str, str]) -> tuple[int, bytes]:
    """An answer's status and body."""
    try:
        with urllib.request.urlopen(
            urllib.request.Request(address + path, headers=dict(own)), timeout=_PATIENCE_S
        ) as got:
            return got.status, got.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()
    except (OSError, HTTPException) as error:
        raise UserError(
            f"no Ray dashboard answers at {address} ({getattr(error, 'reason', error)}); start the cluster, or give "
            "its address with ray.address="
        ) from None


def amounts(resources: Mapping[str, float]) -> str:
    """CPUs and GPUs in words."""
    return " and ".join(f"{resources.get(name, 0):g} {name}s" for name in ("CPU", "GPU"))
