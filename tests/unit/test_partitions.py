"""What a SLURM cluster has, and what is refused of it."""

from __future__ import annotations

import pytest

from cluster.places import partitions
from sm_train.errors import UserError

# sinfo 22.05's lines, with the GRES of a site that has several kinds.
SAID = """\
cpu*|1-00:00:00|1-infinite|c1|64|(null)|idle
cpu*|1-00:00:00|1-infinite|c2|64|(null)|idle
gpu|12:00:00|1-4|g1|32|gpu:a100:4(S:0-1),nvme:1|idle
gpu|12:00:00|1-4|g2|32|gpu:a100:4(S:0-1),nvme:1|idle
gpu|12:00:00|1-4|g3|96+|gpu:h100:8|idle
debug|30:00|1|c1|64|(null)|idle
mixed|infinite|1-infinite|m1|16|gpu:1,gpu:t4:2|idle
"""
FOUND = partitions.read(SAID)


def test_nodes_are_read_with_their_gpus() -> None:
    assert [(node.name, node.cpus, node.gpus) for node in FOUND] == [
        ("c1", 64, 0), ("c2", 64, 0), ("g1", 32, 4), ("g2", 32, 4), ("g3", 96, 8), ("c1", 64, 0), ("m1", 16, 3),
    ]  # fmt: skip
    assert {node.partition for node in FOUND if node.is_default} == {"cpu"}
    assert [node.most_nodes for node in FOUND[2:6]] == [4, 4, 4, 1]


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        ("30", 1800), ("30:10", 1810), ("8:00:00", 28800), ("1-12", 129600), ("1-12:30", 131400),
        ("2-01:00:05", 176405), ("infinite", float("inf")), ("UNLIMITED", float("inf")),
    ],
)  # fmt: skip
def test_times_in_slurm_s_forms(time: str, seconds: float) -> None:
    assert partitions.seconds(time) == seconds


@pytest.mark.parametrize("time", ["8h", "1:2:3:4", "-1", "1-", "", "1.5"])
def test_another_form_is_refused(time: str) -> None:
    with pytest.raises(ValueError, match="it must be as 30"):
        partitions.seconds(time)


@pytest.mark.parametrize(
    ("partition", "nodes", "cpus", "gpus", "time"),
    [("", 2, 64, 0, ""), ("gpu", 3, 32, 4, "12:00:00"), ("gpu", 1, 96, 8, "1"), ("mixed", 1, 1, 3, "30-0")],
)
def test_what_fits_is_let_through(partition: str, nodes: int, cpus: int, gpus: int, time: str) -> None:
    partitions.check(FOUND, partition, nodes, cpus, gpus, time)


@pytest.mark.parametrize(
    ("partition", "nodes", "cpus", "gpus", "time", "said"),
    [
        ("gpus", 1, 1, 0, "", "slurm.partition is 'gpus'; this cluster has cpu, debug, gpu, mixed"),
        ("cpu", 3, 1, 0, "", "nodes is 3; a job in partition cpu gets at most 2"),
        ("debug", 2, 1, 0, "", "nodes is 2; a job in partition debug gets at most 1"),
        ("gpu", 2, 32, 8, "", "32 CPUs and 8 GPUs on each of 2 nodes: partition gpu has 1 such nodes; its largest"),
        ("", 1, 65, 0, "", "65 CPUs and 0 GPUs on each of 1 nodes: partition cpu has 0 such nodes; its largest has 64"),
        ("", 1, 1, 1, "", "partition cpu has 0 such nodes; its largest has 64 CPUs and 0 GPUs"),
        ("gpu", 1, 1, 0, "12:00:01", "slurm.time is 12:00:01; partition gpu allows at most 12:00:00"),
        ("debug", 1, 1, 0, "1:00:00", "slurm.time is 1:00:00; partition debug allows at most 30:00"),
    ],
)  # fmt: skip
def test_what_does_not_is_named(partition: str, nodes: int, cpus: int, gpus: int, time: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        partitions.check(FOUND, partition, nodes, cpus, gpus, time)
    assert said in str(caught.value)


def test_without_a_default_a_partition_must_be_named() -> None:
    with pytest.raises(UserError, match=r"slurm\.partition is not set, and none is the default; this cluster has gpu"):
        partitions.check([node for node in FOUND if node.partition == "gpu"], "", 1, 1, 0, "")


def test_of_several_partitions_one_must_do() -> None:
    partitions.check(FOUND, "debug,gpu", 2, 8, 4, "6:00:00")
    with pytest.raises(UserError, match="partition debug"):
        partitions.check(FOUND, "gpu,debug", 1, 100, 8, "")
    with pytest.raises(UserError, match=r"slurm\.partition is 'nope'"):
        partitions.check(FOUND, "nor,nope", 1, 1, 0, "")


def test_a_node_that_is_drained_is_told_from_one_that_is_up() -> None:
    nodes = partitions.read(
        "a*|1:00|1-2|n1|2|(null)|idle\na*|1:00|1-2|n2|2|(null)|drain\na*|1:00|1-2|n3|2|(null)|idle*\n"
    )
    assert [node.is_up for node in nodes] == [True, False, False]
