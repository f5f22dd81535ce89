"""SLURM's variables as those of a rank."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cluster import launch
from cluster.stages import PORTS
from sm_train.errors import UserError
from tests.builders import run_module


def of(rank: int, local: int, node: int, **env: str) -> dict[str, str]:
    """Of a task among seven, on nodes of 2, 2, 2 and 1, as srun 22.05 sets them."""
    return {
        "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(local), "SLURM_NODEID": str(node), "SLURM_NTASKS": "7",
        "SLURM_STEP_NODELIST": "gpu[003-005],gpu012", "SLURM_STEP_TASKS_PER_NODE": "2(x3),1",
        "SLURM_JOB_NODELIST": "gpu[003-005],gpu012", "SLURM_TASKS_PER_NODE": "2(x3),1",
        "SLURM_JOB_ID": "42", "SLURM_STEP_ID": "0", **env,
    }  # fmt: skip


def address(node: str) -> str:
    return f"{node}.cluster"


def test_every_task_of_uneven_nodes_has_its_place_and_all_have_one_meeting_point() -> None:
    tasks = [(0, 0, 0), (1, 1, 0), (2, 0, 1), (3, 1, 1), (4, 0, 2), (5, 1, 2), (6, 0, 3)]
    found = [launch.rank_variables(of(*task), address) for task in tasks]
    assert [v["RANK"] for v in found] == list("0123456")
    assert [v["LOCAL_RANK"] for v in found] == list("0101010")
    assert [v["LOCAL_WORLD_SIZE"] for v in found] == list("2222221")
    assert {v["WORLD_SIZE"] for v in found} == {"7"}
    assert {v["MASTER_ADDR"] for v in found} == {"gpu003.cluster"}
    assert len({v["MASTER_PORT"] for v in found}) == 1


def test_a_step_on_some_of_the_job_s_nodes_counts_its_own() -> None:
    step = {"SLURM_STEP_NODELIST": "gpu012", "SLURM_STEP_TASKS_PER_NODE": "3", "SLURM_NTASKS": "3"}
    found = launch.rank_variables(of(2, 2, 0, **step), address)
    assert (found["MASTER_ADDR"], found["LOCAL_WORLD_SIZE"]) == ("gpu012.cluster", "3")


def test_another_job_start_or_step_meets_at_another_port_and_all_lie_in_the_range() -> None:
    starts = [{"SLURM_JOB_ID": str(job), "SLURM_RESTART_COUNT": str(n)} for job in range(300) for n in range(3)]
    starts += [{"SLURM_STEP_ID": "1"}]
    ports = [int(launch.rank_variables(of(0, 0, 0, **start), address)["MASTER_PORT"]) for start in starts]
    assert set(ports) <= set(PORTS)
    assert len(set(ports)) > 0.9 * len(ports)
    assert len({*ports[:3]}) == 3


def test_an_address_and_a_port_that_are_set_stay() -> None:
    def never(node: str) -> str:
        raise AssertionError(node)

    found = launch.rank_variables(of(0, 0, 0, MASTER_ADDR="10.0.0.1", MASTER_PORT="29500"), never)
    assert (found["MASTER_ADDR"], found["MASTER_PORT"]) == ("10.0.0.1", "29500")


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("gpu[007-009,12]-ib,login", "gpu007-ib"),
        ("r[2-3]n[10,12]", "r2n10"),
        ("a[5]", "a5"),
        ("c1-[04-07]", "c1-04"),
    ],
)
def test_the_first_of_a_list_of_nodes(nodes: str, first: str) -> None:
    assert launch.first_node(nodes) == first


def test_tasks_per_node() -> None:
    assert launch.tasks_per_node("2(x3),1") == [2, 2, 2, 1]
    assert launch.tasks_per_node("4") == [4]
    assert launch.tasks_per_node("1,8(x2),3") == [1, 8, 8, 3]


def test_a_name_that_resolves_is_its_own_address_and_one_that_nobody_knows_a_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert launch.address_of("localhost") == "localhost"
    monkeypatch.setenv("PATH", str(tmp_path))  # no scontrol
    with pytest.raises(UserError, match=r"node nowhere\.invalid has no address: .* set MASTER_ADDR"):
        launch.address_of("nowhere.invalid")


def without_slurm() -> dict[str, str]:
    return {name: "" for name in os.environ if name.startswith("SLURM")}


def test_outside_slurm_it_says_how_to_start() -> None:
    ran = run_module("cluster.launch", "pretrain", "configs/pretrain/miniature.yaml", **without_slurm())
    assert ran.returncode == 2
    assert ran.stderr.startswith("error: SLURM_PROCID is not set; srun starts this command, in a job: sbatch ")
    assert ran.stderr.count("\n") == 1


@pytest.mark.parametrize("words", [[], ["evaluate", "x.yaml"]])
def test_a_stage_without_ranks_is_refused(words: list[str]) -> None:
    with pytest.raises(UserError, match="stage is pretrain or tune"):
        launch.main(words)


def test_it_becomes_the_stage_with_a_rank_s_variables() -> None:
    """One task of one: the stage itself says what it thinks of the config, in the same process."""
    one = {"SLURM_NTASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_STEP_NODELIST": "localhost"}
    ran = run_module("cluster.launch", "pretrain", "nowhere.yaml", **of(0, 0, 0, **one))
    assert ran.returncode == 2
    assert ran.stderr.startswith("error: config file nowhere.yaml does not exist; usage: python -m sm_train.pretrain ")
