"""Whether a job that has left goes back into the queue."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster import again
from sm_train.errors import UserError
from tests.builders import run_module

RUN = ["run.yaml"]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run folder with a config beside it, and this process in the folder of both."""
    (tmp_path / "run.yaml").write_text("run: runs/one\n")
    (tmp_path / "runs/one/checkpoints").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs/one"


def save(run: Path, step: int) -> None:
    link = run / "checkpoints/latest"
    link.unlink(missing_ok=True)
    link.symlink_to(f"step-{step}")


@pytest.mark.parametrize("status", [75, 76, 130, 137, 138, 143])
def test_what_a_signal_or_a_lost_rank_ended_starts_again(status: int) -> None:
    assert again.verdict(status, 2, 3) is None
    assert "3 starts again brought no progress" in str(again.verdict(status, 3, 3))


@pytest.mark.parametrize("status", [1, 2, 127])
def test_a_bug_or_a_mistake_does_not(status: int) -> None:
    assert "is not mended by another start" in str(again.verdict(status, 0, 3))


def test_starts_are_counted_from_the_last_new_checkpoint(run: Path) -> None:
    env = {"SLURM_JOB_ID": "7"}
    counts = [again.times_without_progress("pretrain", RUN, env)]
    save(run, 5)
    counts += [again.times_without_progress("tune", RUN, env) for _ in range(3)]
    save(run, 6)
    counts += [again.times_without_progress("pretrain", RUN, env) for _ in range(2)]
    assert counts == [0, 0, 1, 2, 0, 1]


def test_another_job_counts_anew(run: Path) -> None:
    save(run, 5)
    found = [again.times_without_progress("pretrain", RUN, {"SLURM_JOB_ID": job}) for job in ("7", "7", "8")]
    assert found == [0, 1, 0]


def test_precompute_counts_slurm_s_own_restarts() -> None:
    assert again.times_without_progress("precompute", ["c.yaml"], {}) == 0
    assert again.times_without_progress("precompute", ["c.yaml"], {"SLURM_RESTART_COUNT": "2"}) == 2


def test_the_run_folder_is_the_last_word_s_or_the_file_s(run: Path) -> None:
    assert again.run_folder(RUN) == Path("runs/one")
    assert again.run_folder([*RUN, "run=a", "loop.steps=3", "run=b"]) == Path("b")
    (run.parents[1] / "run.yaml").write_text("shards: x\n")
    with pytest.raises(UserError, match="names no run folder"):
        again.run_folder(RUN)


@pytest.mark.parametrize("argv", [[], ["x", "pretrain"], ["75"]])
def test_a_wrong_command_line_shows_its_usage(argv: list[str]) -> None:
    with pytest.raises(UserError, match=r"usage: python -m cluster\.again STATUS"):
        again.main(argv)


def test_a_signal_that_came_before_training_is_explained(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    again.main(["138", "pretrain", *RUN])
    assert "is --signal too long before the end of --time?" in capsys.readouterr().out
    again.main(["137", "pretrain", *RUN])
    assert "--signal" not in capsys.readouterr().out


def test_the_exit_code_is_the_answer(run: Path) -> None:
    save(run, 5)
    codes = []
    for status in (75, 75, 0, 2):
        ran = run_module(
            "cluster.again", status, "pretrain", run.parents[1] / "run.yaml", f"run={run}",
            SLURM_JOB_ID="7", SM_MAX_REQUEUES="1",
        )  # fmt: skip
        codes.append((ran.returncode, ran.stdout.strip()))
    assert codes == [
        (0, "queued again: exit code 75; 0 starts without progress before"),
        (3, "not queued again: exit code 75, and 1 starts again brought no progress (SM_MAX_REQUEUES=1)"),
        (3, ""),
        (3, "not queued again: exit code 2 is not mended by another start"),
    ]
