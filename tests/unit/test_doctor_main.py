"""The doctor's command line: the same words as cluster.submit's."""

from __future__ import annotations

import pytest

from cluster.doctor import __main__ as doctor
from sm_train.errors import UserError
from tests.builders import ROOT

CONFIG = str(ROOT / "configs/pretrain/miniature.yaml")


def test_words_of_the_submission_and_of_the_stage() -> None:
    assert doctor.read([]) is None
    work = doctor.read(["pretrain", CONFIG, "nodes=2", "ranks_per_node=4", "batch.lanes=8", "gpu=A100-80"])
    assert work is not None
    assert (work.ranks.count, work.ranks.per_node, work.submit.gpu, work.cfg.batch.lanes) == (8, 4, "A100-80", 8)
    assert not work.ranks.on_cpu  # as a GPU is named
    names = [check.name for check in doctor.checks(work)]
    assert names.index("python") < names.index("folder") < names.index("shards") < names.index("trial")
    assert "shards" not in [check.name for check in doctor.checks(None)]


@pytest.mark.parametrize(
    ("argv", "says"),
    [(["retarget", "x"], "stage is 'retarget'"), (["pretrain", CONFIG, "loop.stepps=3"], "unknown key"),
     (["pretrain", CONFIG, "nodes=0"], "nodes is 0"), (["pretrain"], "no config file given")],
)  # fmt: skip
def test_a_mistaken_line_is_the_person_s(argv: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        doctor.read(argv)


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    doctor.main(["--help"])
    assert "ranks_per_node" in capsys.readouterr().out
