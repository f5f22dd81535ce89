"""Stage 1 end to end: equal for any number of ranks and either engine, and undisturbed by being killed.

Runs are judged by the files they leave. Ranks that need no launcher of their own are forks of the test's process, which
saves them the imports; the command line and torchrun are used where processes are the point.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sm_train import errors, pretrain
from sm_train.data.loader import plan_items
from sm_train.data.plan import Position
from sm_train.models.mapper import SpeechMapper
from sm_train.records import Batch
from sm_train.train.objectives.padded import PaddedObjective
from tests import training
from tests.builders import ROOT, child_env
from tools.compare_runs import compare

pytestmark = pytest.mark.slow
STEPS = 10
ZERO = ("engine.name=deepspeed", "engine.zero_stage=1")


@pytest.fixture(scope="module")
def shard_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return training.shard_set(tmp_path_factory.mktemp("pretrain") / "shards")


@pytest.fixture(scope="module")
def local_run(shard_folder: Path) -> Path:
    """One undisturbed run of the command on one rank of the plain-torch engine."""
    path = training.write_config(shard_folder.parent / "local.yaml", shard_folder)
    done = training.run_command([sys.executable, "-m", "sm_train.pretrain", str(path)])
    assert done.returncode == 0, done.stderr
    assert f"step {STEPS}/{STEPS}" in done.stdout
    return path.with_suffix("")


@pytest.fixture(scope="module")
def zero_run(shard_folder: Path) -> Path:
    """One undisturbed run of two ranks of ZeRO-1 under torchrun."""
    path = training.write_config(shard_folder.parent / "zero.yaml", shard_folder, engine={"name": "deepspeed"})
    done = training.run_command(training.torchrun(2, "sm_train.pretrain", path))
    assert (path.with_suffix("") / f"checkpoints/step-{STEPS}/state.json").exists(), done.stderr
    return path.with_suffix("")


@pytest.fixture(scope="module", autouse=True)
def _deepspeed_is_imported() -> None:
    """Once here instead of once in each fork."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed  # noqa: F401


def config(folder: Path, name: str, shard_folder: Path, **overrides: object) -> Path:
    return training.write_config(folder / f"{name}.yaml", shard_folder, **overrides)


def state_of(run: Path) -> dict[str, object]:
    state: dict[str, object] = json.loads((run / "checkpoints/latest/state.json").read_text())
    return state


def assert_same_run(run: Path, undisturbed: Path) -> None:
    """The same weights and moments, bit for bit, and each step once with the same losses."""
    assert state_of(run) == state_of(undisturbed)
    for link in ("latest", "best"):
        assert os.readlink(run / "checkpoints" / link) == os.readlink(undisturbed / "checkpoints" / link)
    found = compare(run, undisturbed, tolerance=0.0)
    assert found.equal, f"\n{found}"
    assert {"loss", "loss_word", "grad_norm", "lr", "epoch", "padding", "valid_wer", "weights", "first moments"} <= {
        quantity.name for quantity in found.quantities
    }


def assert_close_run(run: Path, undisturbed: Path) -> None:
    """The same plan, nearly the same losses, norms and moments; not the weights, as Adam makes steps of rounding."""
    found = compare(run, undisturbed, tolerance=1e-5)
    beyond = {quantity.name for quantity in found.quantities if quantity.first}
    assert not found.findings, f"\n{found}"
    assert beyond <= {"weights"}, f"\n{found}"


# ---- equal for any number of ranks, either engine


def gradients(path: Path, name: str, world_size: int, *words: str) -> tuple[dict[str, Tensor], dict[str, float]]:
    out = path.with_name(f"{name}.safetensors")
    assert training.in_ranks(world_size, lambda: training.first_gradients(path, out, *words)) == [0] * world_size
    tensors = load_file(out)
    losses = {term: float(tensors.pop(term)) for term in list(tensors) if term.startswith("loss")}
    return tensors, losses


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def one_rank(request: pytest.FixtureRequest, shard_folder: Path, tmp_path_factory: pytest.TempPathFactory
             ) -> tuple[str, Path, dict[str, Tensor], dict[str, float]]:  # fmt: skip
    """Precision, config, gradients and losses of one rank of the plain-torch engine."""
    precision = str(request.param)
    path = config(tmp_path_factory.mktemp(precision), "gradients", shard_folder, engine={"precision": precision})
    return precision, path, *gradients(path, "one", 1)


@pytest.mark.parametrize(
    ("engine", "world_size"), [("local", 2), ("local", 4), ("zero-1", 1), ("zero-1", 2), ("zero-2", 2)]
)
def test_a_step_s_gradient_is_the_same_for_any_ranks_and_engine(
    one_rank: tuple[str, Path, dict[str, Tensor], dict[str, float]], engine: str, world_size: int
) -> None:
    """One rank x 4 micro-batches == 2 x 2 == 4 x 1, with dropout."""
    _, path, expected, expected_losses = one_rank
    words = () if engine == "local" else ("engine.name=deepspeed", f"engine.zero_stage={engine[-1]}")
    found, losses = gradients(path, f"{engine}-{world_size}", world_size, *words)
    assert training.load(path).mapper.dropout > 0
    assert sum(float(t.square().sum()) for t in expected.values()) > 1e-3
    assert training.relative_difference(found, expected) < 1e-6
    assert losses == pytest.approx(expected_losses, rel=1e-6)


def test_zero_on_two_ranks_trains_as_plain_torch_on_one(local_run: Path, zero_run: Path) -> None:
    assert_close_run(zero_run, local_run)


# ---- killed and started again


def test_a_torchrun_that_is_killed_takes_its_ranks_along_and_goes_on_bit_equal(
    zero_run: Path, shard_folder: Path, tmp_path: Path
) -> None:
    path = config(tmp_path, "killed", shard_folder, engine={"name": "deepspeed"})
    run = path.with_suffix("")
    command = training.torchrun(2, "sm_train.pretrain", path)
    log = (tmp_path / "torchrun.log").open("w")
    launcher = subprocess.Popen(command, cwd=ROOT, env=child_env(), stdout=log, stderr=log, start_new_session=True)
    try:
        training.wait_for(lambda: launcher.poll() is not None or (run / "checkpoints/latest").exists())
        ranks = [int(pid) for pid in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()]
        assert len(ranks) == 2
    finally:
        os.killpg(launcher.pid, signal.SIGKILL)
        launcher.wait()
    training.wait_for(lambda: not any(is_alive(pid) for pid in ranks), timeout_s=10)
    assert state_of(run)["global_step"] in (3, 5, 6, 9)  # with none, the kill came too late: the run is too short
    done = training.run_command(command)
    assert_same_run(run, zero_run)
    assert training.metrics(run)[-1]["attempt"] == 2, done.stderr


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.fixture(scope="module")
def stopped_run(local_run: Path, shard_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config of a run on one rank that was killed in step 8: its checkpoint is of step 6."""
    path = config(tmp_path_factory.mktemp("stopped"), "stopped", shard_folder)

    def work() -> None:
        training.kill_at_step(8, path.with_suffix(""), saved=6)
        training.train(path)

    assert training.in_ranks(1, work) == [-signal.SIGKILL]
    assert state_of(path.with_suffix(""))["global_step"] == 6
    return path


def copy_of(stopped: Path, folder: Path, shard_folder: Path) -> Path:
    path = config(folder, "resumed", shard_folder)
    shutil.copytree(stopped.with_suffix(""), path.with_suffix(""), symlinks=True)
    return path


@pytest.mark.parametrize("words", [(), ZERO], ids=["local", "zero-1"])
def test_a_run_goes_on_with_another_number_of_ranks_and_another_engine(
    local_run: Path, stopped_run: Path, shard_folder: Path, tmp_path: Path, words: tuple[str, ...]
) -> None:
    path = copy_of(stopped_run, tmp_path, shard_folder)
    assert training.in_ranks(2, lambda: training.train(path, *words)) == [0, 0]
    assert_close_run(tmp_path / "resumed", local_run)
    assert [line["attempt"] for line in training.metrics(tmp_path / "resumed")] == [1] * 6 + [2] * 4
    taken: list[list[tuple[int, list[int]]]] = []
    for world_size in (1, 2):
        ranks = [items_of(path, rank, world_size) for rank in range(world_size)]
        taken.append([sorted(itertools.chain(*(rank[i] for rank in ranks))) for i in range(4)])
    assert taken[0] == taken[1]


def items_of(path: Path, rank: int, world_size: int) -> list[list[tuple[int, list[int]]]]:
    """(lane, ordinals) of the four steps after the sixth, by the plan."""
    cfg = training.load(path)
    items = pretrain.Sources(cfg.shards, cfg.target).training(cfg.splits, cfg.seed)
    planner = plan_items(items, cfg.seed, cfg.batch.frames, cfg.batch.lanes)
    loader = pretrain.Loader(items, lambda columns: columns, planner, rank, world_size)
    steps = list(zip(range(10), loader.steps(Position(0, 0)), strict=False))[6:]
    return [[(lane, batch.ordinals.tolist()) for lane, batch in step.batches] for _, step in steps]


def test_bf16_under_zero_goes_on_bit_equal(shard_folder: Path, tmp_path: Path) -> None:
    paths = [config(tmp_path, name, shard_folder, engine={"precision": "bf16"}) for name in ("whole", "killed")]

    def work() -> None:
        if os.environ["RANK"] == "0":
            training.kill_at_step(8, tmp_path / "killed", saved=6)
        training.train(paths[1], *ZERO, "engine.timeout_s=20")

    assert training.in_ranks(2, lambda: training.train(paths[0], *ZERO)) == [0, 0]
    assert training.in_ranks(2, work)[0] == -signal.SIGKILL
    assert state_of(tmp_path / "killed")["global_step"] == 6
    assert training.in_ranks(2, lambda: training.train(paths[1], *ZERO)) == [0, 0]
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


def test_a_finished_run_is_left_alone(local_run: Path) -> None:
    def contents() -> dict[str, tuple[int, str]]:
        paths = sorted(path for path in local_run.rglob("*") if path.is_file())
        return {str(p): (p.stat().st_mtime_ns, hashlib.sha256(p.read_bytes()).hexdigest()) for p in paths}

    before = contents()
    assert len(before) > 8
    assert training.in_ranks(2, lambda: training.train(local_run.with_suffix(".yaml"))) == [0, 0]
    assert contents() == before


def test_a_finished_run_can_be_lengthened(local_run: Path, shard_folder: Path, tmp_path: Path) -> None:
    path = copy_of(local_run.with_suffix(".yaml"), tmp_path, shard_folder)
    assert training.in_ranks(1, lambda: training.train(path, "loop.steps=12")) == [0]
    assert [line["step"] for line in training.metrics(tmp_path / "resumed")] == list(range(1, 13))
    assert state_of(tmp_path / "resumed")["adam_step"] == 12


def test_a_checkpoint_of_zero_needs_no_deepspeed(zero_run: Path) -> None:
    code = (
        "import sys, torch; from sm_train.models.mapper import SpeechMapper; "
        f"mapper = SpeechMapper.from_pretrained({str(zero_run / 'checkpoints/latest')!r}); "
        "assert 'deepspeed' not in sys.modules; "
        "print(float(mapper(torch.ones(1, 20, mapper.cfg.widths[0]), torch.tensor([20])).double().sum()))"
    )
    done = training.run_command([sys.executable, "-c", code])
    assert done.returncode == 0, done.stderr
    mapper = SpeechMapper.from_pretrained(zero_run / "checkpoints/latest")
    with torch.no_grad():
        assert float(done.stdout) == float(mapper(torch.ones(1, 20, training.E), torch.tensor([20])).double().sum())
    weights = load_file(zero_run / "checkpoints/latest/mapper.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert set(weights) == set(dict(mapper.named_parameters()))  # the mapper's, nothing frozen


# ---- what is not finite, under DeepSpeed


class Spoiled(PaddedObjective):
    """The first micro-batch that holds utterance 19 has a bad loss or a bad gradient; the other lanes are sound."""

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        sums = super().forward(batch)
        if 19 in batch.ordinals and os.environ["SPOILED"] == "loss":
            sums["word"] = sums["word"] * float("nan")
        if os.environ["SPOILED"] == "gradient" and self.training and not hasattr(self, "begun"):
            self.begun = True  # each rank's first micro-batch
            sums["word"] = sums["word"] + (self.mapper.head.bias[0] * 0.0).abs().sqrt()
        return sums


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_zero_skips_a_gradient_that_is_not_finite_even_in_the_first_step(
    shard_folder: Path, tmp_path: Path, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPOILED", "gradient")
    monkeypatch.setattr(pretrain, "PaddedObjective", Spoiled)
    path = config(tmp_path, "run", shard_folder, engine={"precision": precision})
    words = (*ZERO, "loop.nonfinite=skip", "loop.save_every=1", "loop.steps=3", "loop.keep=9", "valid_splits=[]")
    assert training.in_ranks(1, lambda: training.train(path, *words)) == [0]
    assert [line["skipped"] for line in training.metrics(tmp_path / "run")] == [1, 0, 0]
    assert state_of(tmp_path / "run")["adam_step"] == 2
    first = training.tensors_of(tmp_path / "run/checkpoints/step-1")
    assert all((tensor == 0).all() for name, tensor in first.items() if name.startswith("exp_avg"))
    assert all(torch.isfinite(t).all() for t in training.tensors_of(tmp_path / "run/checkpoints/latest").values())


def test_under_zero_a_bad_loss_on_one_rank_stops_both(
    shard_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPOILED", "loss")
    monkeypatch.setattr(pretrain, "PaddedObjective", Spoiled)
    path = config(tmp_path, "run", shard_folder)

    def work() -> None:
        with pytest.raises(errors.UserError, match=r"the loss is not finite at epoch 0.*utterances utt-") as raised:
            training.train(path, *ZERO)
        (tmp_path / f"rank{os.environ['RANK']}").write_text(str(raised.value))

    assert training.in_ranks(2, work) == [0, 0]
    assert (tmp_path / "rank0").read_text() == (tmp_path / "rank1").read_text()


# ---- a person's mistakes: one line that names the thing, exit code 2


def fails(path: Path, *words: str, world_size: int = 1) -> str:
    """What the command prints on rank 0 where it ends with exit code 2."""
    out = path.with_suffix(".err")

    def work() -> None:
        sys.argv = ["pretrain", str(path), *words]
        name = out if os.environ["RANK"] == "0" else out.with_suffix(".other")
        with name.open("w") as sys.stderr:
            try:
                errors.run_command(pretrain.main)
            except SystemExit as left:
                sys.stderr.flush()
                os._exit(int(left.code or 0))

    assert training.in_ranks(world_size, work) == [2] * world_size, out.read_text()
    text = out.read_text()
    assert text.count("\n") == 1
    assert text.startswith("error: ")
    return text


@pytest.mark.parametrize(
    ("words", "world_size", "expected"),
    [
        (["mapper.depth=3"], 1, ["unknown key 'mapper.depth'"]),
        (["loop.steps=many"], 1, ["'loop.steps'", "'many'"]),
        (["target=llama"], 1, ["no complete target set 'llama'", "it has: words"]),
        (["shards=/nowhere"], 1, ["/nowhere"]),
        (["splits=[dev]"], 1, ["no utterance in split 'dev'", "it has: train, valid"]),
        (["valid_splits=[dev]"], 1, ["no utterance in split 'dev'"]),
        (["batch.frames=20"], 1, ["'utt-", "budget of 20"]),
        (["batch.lanes=100"], 1, ["52 items cannot fill 100 lanes"]),
        (["batch.lanes=0"], 1, ["batch.lanes is 0"]),
        (["batch.lanes=3"], 2, ["batch.lanes is 3, which 2 ranks do not divide"]),
        (["batch.lanes=1", *ZERO], 2, ["batch.lanes is 1, which 2 ranks do not divide"]),
        (["mapper.widths=[20,16,32]"], 1, ["mapper.widths[0] is 20", "16 wide"]),
        (["engine.name=horovod"], 1, ["engine.name is 'horovod'", "local, deepspeed"]),
        (["seed=-1"], 1, ["seed is -1"]),
        (["trim=tail"], 1, ["trim is 'tail'", "change_point"]),
    ],
)
def test_a_mistake_is_one_line(
    shard_folder: Path, tmp_path: Path, words: list[str], world_size: int, expected: list[str]
) -> None:
    text = fails(config(tmp_path, "run", shard_folder), *words, world_size=world_size)
    for part in expected:
        assert part in text


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("seed=7", ["seed is 0 there, but 7 is asked for"]),
        ("schedule.lr=0.1", ["schedule.lr is 0.003 there, but 0.1 is asked for"]),
        ("batch.lanes=2", ["batch.lanes is 4 there, but 2 is asked for"]),
        ("mapper.layers=2", ["mapper.layers is 1 there, but 2 is asked for"]),
        ("engine.beta2=0.5", ["engine.beta2 is 0.98 there, but 0.5"]),
        ("splits=[train,valid]", ["splits is ['train'] there, but ['train', 'valid']"]),
    ],
)
@pytest.mark.parametrize("is_finished", [False, True])
def test_a_changed_setting_is_named_with_both_values(
    stopped_run: Path,
    local_run: Path,
    shard_folder: Path,
    tmp_path: Path,
    word: str,
    expected: list[str],
    is_finished: bool,
) -> None:
    path = copy_of(local_run.with_suffix(".yaml") if is_finished else stopped_run, tmp_path, shard_folder)
    before = (tmp_path / "resumed/config.yaml").read_text()
    text = fails(path, word)
    for part in [*expected, "resumed", "give another run folder"]:
        assert part in text
    assert (tmp_path / "resumed/config.yaml").read_text() == before
    assert [p.name for p in (tmp_path / "resumed/attempts").iterdir()] == ["1.json"]


def test_the_command_itself_ends_with_2_and_one_line(shard_folder: Path, tmp_path: Path) -> None:
    path = config(tmp_path, "run", shard_folder)
    done = training.run_command([sys.executable, "-m", "sm_train.pretrain", str(path), "target=llama"])
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
