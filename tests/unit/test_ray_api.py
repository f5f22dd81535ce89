"""The dashboard's HTTP, from a server that answers as Ray's does, or not at all."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from cluster.places import ray_api
from sm_train.errors import UserError
from tests.training import free_port

NODES = [
    {"state": "ALIVE", "resources_total": {"CPU": 4.0, "GPU": 1.0, "memory": 1e9}},
    {"state": "DEAD", "resources_total": {"CPU": 8.0}},
    {"state": "ALIVE", "resources_total": {"memory": 1e9}},
]


class Dashboard(ThreadingHTTPServer):
    """Asks for a token, if it has one."""

    token: str | None = "right"
    body = json.dumps({"result": True, "data": {"result": {"result": NODES}}}).encode()

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Dashboard

    def do_GET(self) -> None:
        """Answer as Ray's middleware does."""
        given = self.headers.get("Authorization")
        wanted = self.server.token and f"Bearer {self.server.token}"
        status = 200 if not wanted or given == wanted else 401 if given is None else 403
        body = b'{"ray_version": "2.60.0"}' if self.path == "/api/version" else self.server.body
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body if status == 200 else b"no")

    def log_message(self, *args: Any) -> None:
        """Say nothing."""


@pytest.fixture
def dashboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Dashboard]:
    """One that asks for a token; none is here."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    with Dashboard(("127.0.0.1", 0), _Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_living_nodes_and_what_they_have(dashboard: Dashboard, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "right\n")
    assert ray_api.nodes(dashboard.url) == [NODES[0]["resources_total"], NODES[2]["resources_total"]]
    assert capsys.readouterr().err == ""


def test_a_token_is_looked_for_where_ray_looks(
    dashboard: Dashboard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ray_api.headers() == {}
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray/auth_token").write_text("home\n")
    assert ray_api.token() == "home"
    (tmp_path / "token").write_text("file")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    assert ray_api.token() == "file"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "given")
    assert ray_api.headers() == {"Authorization": "Bearer given"}
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "absent")
    with pytest.raises(UserError, match="RAY_AUTH_TOKEN_PATH is 'absent', which cannot be read"):
        ray_api.token()


def test_no_token_and_a_wrong_one(dashboard: Dashboard, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="asks for a token, and none is here; set RAY_AUTH_TOKEN_PATH or"):
        ray_api.nodes(dashboard.url)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong")
    with pytest.raises(UserError, match=r"refuses the token \(403\); set RAY_AUTH_TOKEN_PATH or RAY_AUTH_TOKEN"):
        ray_api.nodes(dashboard.url)


def test_a_cluster_that_is_open_to_all_is_warned_of(dashboard: Dashboard, capsys: pytest.CaptureFixture[str]) -> None:
    dashboard.token = None
    assert len(ray_api.nodes(dashboard.url)) == 2
    assert "takes jobs from anybody who reaches it; start it with RAY_AUTH_MODE=token" in capsys.readouterr().err


@pytest.mark.parametrize("body", [b"<html>", b"{}", b'{"data": null}', b"\xff"])
def test_what_is_no_dashboard(dashboard: Dashboard, body: bytes) -> None:
    dashboard.token, dashboard.body = None, body
    with pytest.raises(UserError, match="and not as a Ray dashboard; give its address"):
        ray_api.nodes(dashboard.url)


@pytest.mark.parametrize("address", ["127.0.0.1:8265", "ray://head:10001", "auto"])
def test_an_address_that_is_none_of_a_dashboard(address: str) -> None:
    with pytest.raises(UserError, match=re.escape(f"ray.address is {address!r}; give the dashboard's, as http://")):
        ray_api.nodes(address)


def test_nobody_answers(dashboard: Dashboard) -> None:
    with pytest.raises(UserError, match=r"no Ray dashboard answers at http://127\.0\.0\.1:\d+ \(.*refused\)"):
        ray_api.nodes(f"http://127.0.0.1:{free_port()}")
