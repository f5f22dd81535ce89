"""Submission to SLURM: the scripts, and what is refused where there is no SLURM; tests/integration has a real one."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from cluster import submit
from cluster.places import slurm as to_slurm
from sm_train.errors import UserError
from tests.submitting import HOME, job, project, require_golden

__all__ = ["project"]

pytestmark = pytest.mark.usefixtures("project")
PRETRAIN = ("pretrain", "configs/pretrain/llama31-8b.yaml", "to=slurm")
PRECOMPUTE = ("precompute", "configs/precompute/librispeech.yaml", "to=slurm")
GPUS = ("gpus_per_node=4", "slurm.partition=gpu", "slurm.time=8:00:00")
ON_4_NODES = ("nodes=4", "ranks_per_node=4", *GPUS)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("slurm-pretrain", (*PRETRAIN, *ON_4_NODES, "slurm.account=speech", "slurm.setup=[module load cuda]")),
        ("slurm-tune", ("tune", "configs/tune/llama31-8b.yaml", "to=slurm", *ON_4_NODES, "slurm.cpus=8", "after=12")),
        ("slurm-evaluate", ("evaluate", "configs/evaluate/llama31-8b.yaml", "to=slurm", "after=12:13")),
        ("slurm-retarget", ("retarget", "data/shards", "to=slurm", "--llm", "some/llm", "--name", "a name")),
        ("slurm-precompute", (*PRECOMPUTE, "gpus_per_node=1", "slurm.tasks=16", "after=11", "slurm.max_requeues=9")),
        ("slurm-precompute-ray", (*PRECOMPUTE, "nodes=4", *GPUS, "slurm.ray=true", "actors=16", "actor_gpus=1")),
    ],
)
def test_the_script_is_as_shown(name: str, words: tuple[str, ...]) -> None:
    made = job(*words)
    for file, text in to_slurm.scripts(made):
        require_golden(name + file.removeprefix("job"), text)
        assert text in to_slurm.script(made)


def test_an_option_stands_once_and_the_template_s_default_gives_way() -> None:
    script = to_slurm.script(job(*PRETRAIN, "slurm.signal_s=120", "name=mine"))
    lines = [line for line in script.splitlines() if line.startswith("#SBATCH")]
    names = [line.partition("=")[0] for line in lines]
    assert len(names) == len(set(names))
    assert "#SBATCH --signal=USR1@120" in lines
    assert "#SBATCH --job-name=mine" in lines
    assert "#SBATCH --requeue" in lines


def test_arguments_and_variables_come_through_a_shell_as_they_are(project: Path) -> None:
    script = to_slurm.script(job("retarget", "set", "to=slurm", "--llm", "a 'b' $c", "name=x"))
    setting = "\n".join(line for line in script.splitlines() if line.startswith(("set --", "export")))
    ran = subprocess.run(["bash", "-c", setting + '\nprintf "%s|" "$@"'], capture_output=True, text=True)
    assert ran.stdout == "cluster.retarget|set|--llm|a 'b' $c|"


def test_processes_ask_for_the_cpus_that_precompute_s_config_names() -> None:
    def cpus(*words: str) -> list[str]:
        lines = to_slurm.script(job(*PRECOMPUTE, "threads=2", "decode_workers=3", *words)).splitlines()
        return [line.partition("=")[2] for line in lines if line.startswith("#SBATCH --cpus-per-task")]

    assert cpus() == ["5", "5"]  # the array's, and the joining job's
    assert cpus("slurm.cpus=7") == ["7", "7"]
    assert cpus("slurm.ray=true", "nodes=2", "actors=5") == ["15"]
    assert cpus("slurm.ray=true", "nodes=2", "actors=4", "decode_actors=2", "decode_actor_cpus=4") == ["8"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((*PRECOMPUTE, "nodes=2"), "precompute takes slurm.tasks=N (an array of jobs), or slurm.ray=true"),
        ((*PRETRAIN, "slurm.tasks=2"), "slurm.ray and slurm.tasks are for precompute, not for pretrain"),
        ((*PRETRAIN, "slurm.ray=true"), "slurm.ray and slurm.tasks are for precompute, not for pretrain"),
        ((*PRETRAIN, "slurm.time=5"), "slurm.time is 5, and the signal to save and leave comes 300 s before its end"),
        (PRETRAIN, "to=slurm: no sbatch here; submit from a login node of the cluster, or look at dry_run=true"),
    ],
)
def test_what_cannot_be_is_refused(
    project: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], said: str
) -> None:
    monkeypatch.setenv("PATH", str(project))  # a machine without SLURM
    with pytest.raises(UserError) as caught:
        to_slurm.check(job(*words))
    assert said in str(caught.value)


def test_a_dry_run_needs_no_slurm(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(project))
    to_slurm.check(job(*PRETRAIN, "dry_run=true"))


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("slurm.time=8h", "slurm.time is '8h'; it must be as 30"),
        ("slurm.tasks=0", "slurm.tasks is 0; it must be at least 1"),
        ("slurm.signal_s=0", "slurm.signal_s is 0; it must be at least 1"),
        ("slurm.max_requeues=-1", "slurm.max_requeues is -1; it must be at least 0"),
    ],
)
def test_a_value_out_of_range_is_named(word: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        submit.read([*PRETRAIN, word])


def test_names_and_folders_are_written_as_sbatch_reads_them(project: Path) -> None:
    lines = to_slurm.script(job(*PRETRAIN, "run=runs/a b%j", "name=my run", "slurm.options=[--exclusive]")).splitlines()
    assert '#SBATCH --job-name="my run"' in lines
    assert f'#SBATCH --output="{HOME}/runs/a b%%j/submitted/0001/slurm-%j.log"' in lines
    assert "#SBATCH --exclusive" in lines


def test_training_asks_for_a_cpu_a_thread() -> None:
    assert "#SBATCH --cpus-per-task=6" in to_slurm.script(job(*PRETRAIN, "engine.threads=6")).splitlines()
