"""A submission's folder: what was submitted is what runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cluster import submission, submit
from sm_train import config
from sm_train.errors import UserError
from sm_train.pretrain import PretrainConfig
from tests.builders import child_env
from tests.submitting import HOME, job, project
from tests.training import shard_set, write_config

__all__ = ["project"]


@pytest.fixture
def made(project: Path) -> submission.Job:
    write_config(project / "run.yaml", shard_set(project / "set", 24))
    found = submit.read(["pretrain", "run.yaml", "loop.steps=7"])
    submission.write(found)
    return found


def test_the_folder_holds_the_resolved_config_and_the_code(made: submission.Job) -> None:
    assert made.folder.name == "0001"
    cfg = config.load(PretrainConfig, [str(made.folder / "config.yaml")], "test")
    assert cfg == made.config
    assert cfg.loop.steps == 7
    facts = json.loads((made.folder / "submission.json").read_text())
    assert facts["words"] == ["run.yaml", "loop.steps=7"]
    assert facts["code_sha256"] == submission.digest(made.folder / "code")
    assert (facts["revision"] or "").count("+") <= 1


def test_the_next_submission_of_a_run_has_a_folder_of_its_own(made: submission.Job, project: Path) -> None:
    again = submit.read(["pretrain", "run.yaml"])
    assert again.folder == made.folder.parent / "0002"
    again.folder.mkdir()
    with pytest.raises(UserError, match="has just been taken by another submission"):
        submission.write(again)


def test_a_job_runs_the_code_that_was_submitted(made: submission.Job, project: Path) -> None:
    """Not the working tree's, though the job starts there, and though that has another version of it."""
    (project / "sm_train").mkdir()
    (project / "sm_train/__init__.py").write_text("raise SystemExit('the working tree')")
    code = "import sm_train, cluster; print(sm_train.__file__, cluster.__file__)"
    env = child_env(**made.env)
    ran = subprocess.run([sys.executable, "-c", code], cwd=project, env=env, capture_output=True, text=True)
    assert ran.stdout.split() == [str(made.folder / "code" / name / "__init__.py") for name in ("sm_train", "cluster")]


def test_a_job_knows_the_commit_that_it_was_submitted_at(made: submission.Job, project: Path) -> None:
    (made.folder / "code/REVISION").write_text("the commit\n")
    code = "from sm_train.runlog import revision; print(revision())"
    env = child_env(**made.env)
    ran = subprocess.run([sys.executable, "-c", code], cwd=project, env=env, capture_output=True, text=True)
    assert ran.stdout == "the commit\n"


def test_paths_are_as_the_nodes_see_them(project: Path) -> None:
    found = job("pretrain", "configs/pretrain/miniature.yaml")
    assert found.args == [f"{HOME}/runs/demo/stage1/submitted/0001/config.yaml"]
    assert found.env["PYTHONPATH"] == f"{HOME}/runs/demo/stage1/submitted/0001/code"
    assert found.name == "pretrain-stage1"


def test_a_set_on_an_object_store_has_its_submissions_under_runs(project: Path) -> None:
    found = job("precompute", "configs/precompute/miniature.yaml", "out=s3://bucket/sets/one")
    assert found.folder == project / "runs/bucket-sets-one/submitted/0001"


def test_the_submitter_s_own_modules_stay_on_the_path(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/shared/mine")
    assert job("pretrain", "configs/pretrain/miniature.yaml").env["PYTHONPATH"].endswith("/code:/shared/mine")


def test_a_variable_of_the_submitter_goes_along(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", "/shared/hub")
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert job("pretrain", "configs/pretrain/miniature.yaml").env["HF_HOME"] == "/shared/hub"
    assert "HF_TOKEN" not in job("pretrain", "configs/pretrain/miniature.yaml").env


def test_a_digest_changes_with_a_name_and_with_a_byte(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    before = submission.digest(tmp_path)
    (tmp_path / "a").write_text("y")
    changed = submission.digest(tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    assert len({before, changed, submission.digest(tmp_path)}) == 3
