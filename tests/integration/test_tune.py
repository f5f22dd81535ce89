"""Stage 2 end to end: equal gradients however the LLM is placed, its weights untouched, no harm from being killed.

Ranks are forks of the test's process; torchrun is used once, where its processes are the point.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sm_train import errors, tune
from sm_train.models.llm import load_model
from sm_train.models.mapper import SpeechMapper
from sm_train.train import origin, start
from tests import training, tuning

pytestmark = pytest.mark.slow
STEPS = 8
REPLICATED, ZERO_3, OFFLOAD = ("placement=replicated",), ("placement=zero3",), ("placement=offload",)
ZERO_1 = (*REPLICATED, "engine.name=deepspeed")


@pytest.fixture(scope="module")
def shard_folder(shard_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the session's set, which gets tasks."""
    return Path(shutil.copytree(shard_set, tmp_path_factory.mktemp("tune") / "set"))


@pytest.fixture(scope="module")
def world(shard_folder: Path) -> Path:
    """The folder of prompts, instructions and a pretrained mapper."""
    return tuning.world(shard_folder.parent, shard_folder)


@pytest.fixture(scope="module", autouse=True)
def _deepspeed_is_imported() -> None:
    """Once here instead of once in each fork."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed  # noqa: F401
    from transformers import AutoModelForCausalLM  # noqa: F401


def config(folder: Path, name: str, world: Path, shard_folder: Path, **overrides: object) -> Path:
    return tuning.write_config(folder / f"{name}.yaml", world, shard_folder, **overrides)


@pytest.fixture(scope="module")
def zero_run(world: Path, shard_folder: Path) -> Path:
    """One undisturbed run of two ranks of ZeRO-3 under torchrun."""
    path = config(world, "zero", world, shard_folder)
    done = training.run_command(training.torchrun(2, "sm_train.tune", path))
    assert (path.with_suffix("") / f"checkpoints/step-{STEPS}/state.json").exists(), done.stderr
    assert f"step {STEPS}/{STEPS}" in done.stdout
    return path.with_suffix("")


# ---- equal for any placement and any number of ranks


def gradients(path: Path, name: str, world_size: int, *words: str) -> tuple[dict[str, Tensor], dict[str, float]]:
    out = path.with_name(f"{name}.safetensors")

    def work() -> None:
        training.first_gradients(path, out, *words, stage=tune)

    assert training.in_ranks(world_size, work) == [0] * world_size
    tensors = load_file(out)
    terms = ("loss", "loss_ce", "loss_word", "loss_pad", "accuracy")
    return {n: t for n, t in tensors.items() if n not in terms}, {n: float(tensors[n]) for n in terms}


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def one_process(request: pytest.FixtureRequest, world: Path, shard_folder: Path
                ) -> tuple[str, Path, dict[str, Tensor], dict[str, float]]:  # fmt: skip
    """Precision, config, gradients and losses of one process of plain torch."""
    path = config(world, f"gradients-{request.param}", world, shard_folder, engine={"precision": request.param})
    return str(request.param), path, *gradients(path, f"one-{request.param}", 1, *REPLICATED)


@pytest.mark.parametrize(
    ("words", "world_size"),
    [
        (REPLICATED, 2),
        (ZERO_1, 2),
        (ZERO_3, 1),
        (ZERO_3, 2),
        (OFFLOAD, 2),
        ((*ZERO_3, "checkpoint_activations=true"), 2),
    ],
    ids=["replicated-2", "zero1-2", "zero3-1", "zero3-2", "offload-2", "recomputed-2"],
)
def test_a_step_s_gradient_is_the_same_for_any_placement(
    one_process: tuple[str, Path, dict[str, Tensor], dict[str, float]], words: tuple[str, ...], world_size: int
) -> None:
    precision, path, expected, expected_losses = one_process
    found, losses = gradients(path, f"{'-'.join(words)}-{world_size}-{precision}".replace("=", "-"), world_size, *words)
    assert sum(float(t.square().sum()) for t in expected.values()) > 1e-6
    # In bf16 ZeRO-3's linear rounds before it adds the mapper's biases and again behind, torch's only behind.
    rounds_twice = precision == "bf16" and not set(words) & {*REPLICATED}
    assert training.relative_difference(found, expected) < (5e-3 if rounds_twice else 1e-6)
    assert losses == pytest.approx(expected_losses, rel=1e-3 if rounds_twice else 1e-6)


@pytest.fixture(scope="module")
def local_run(world: Path, shard_folder: Path) -> Path:
    """One undisturbed run of one process that holds the whole LLM."""
    path = config(world, "local", world, shard_folder)
    assert training.in_ranks(1, lambda: tuning.train(path, *REPLICATED)) == [0]
    return path.with_suffix("")


def assert_close_run(run: Path, undisturbed: Path, tolerance: float = 1e-5) -> None:
    """The same plan, and nearly the same losses and norms."""
    lines, expected = training.metrics(run), training.metrics(undisturbed)
    assert [line["step"] for line in lines] == [line["step"] for line in expected]
    for line, other in zip(lines, expected, strict=True):
        assert (line["epoch"], line["padding"]) == (other["epoch"], other["padding"])
        for name in ("loss", "loss_ce", "loss_word", "grad_norm", "valid_loss"):
            assert line.get(name, 0.0) == pytest.approx(other.get(name, 0.0), rel=tolerance)


def test_placements_train_alike(local_run: Path, zero_run: Path, world: Path, shard_folder: Path) -> None:
    assert_close_run(zero_run, local_run)
    path = config(world, "offload", world, shard_folder)
    assert training.in_ranks(2, lambda: tuning.train(path, *OFFLOAD)) == [0, 0]
    assert_close_run(path.with_suffix(""), local_run)
    first, last = (training.metrics(local_run)[i] for i in (0, -1))
    assert last["loss"] < first["loss"]
    assert {"loss_ce", "loss_word", "loss_pad", "accuracy", "valid_ce", "valid_accuracy", "valid_wer"} <= set(last)


# ---- what is frozen stays frozen


def test_the_llm_is_bit_identical_after_a_thousand_steps(
    world: Path, shard_folder: Path, llm_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under ZeRO-3 on two ranks: every weight, gathered again after the last step, is the file's."""
    path = config(world, "thousand", world, shard_folder, valid_splits=[], batch={"samples": 4, "lanes": 2})
    real, out = start.train, world / "after.json"

    def train_and_compare(cfg: object, schedule: object, engine: object, objective: object, *rest: object) -> None:
        import deepspeed

        real(cfg, schedule, engine, objective, *rest)  # type: ignore[arg-type]
        files = load_file(llm_folder / "model.safetensors")
        own = dict(objective.llm.named_parameters())  # type: ignore[attr-defined]
        unequal = [name for name in own if name not in files]
        for name, weight in own.items():
            with deepspeed.zero.GatheredParameters([weight]):
                unequal += [] if torch.equal(weight.detach(), files[name]) else [name]
                partitioned = hasattr(weight, "ds_tensor") and weight.ds_tensor.numel() < weight.numel()
                unequal += [] if partitioned else [f"{name} is whole"]
        if engine.rank == 0:  # type: ignore[attr-defined]
            out.write_text(json.dumps({"unequal": unequal, "weights": len(own)}))

    monkeypatch.setattr(start, "train", train_and_compare)
    words = (*ZERO_3, "loop.steps=1000", "loop.save_every=1000", "loop.log_every=500")
    assert training.in_ranks(2, lambda: tuning.train(path, *words), timeout_s=240) == [0, 0]
    assert json.loads(out.read_text()) == {"unequal": [], "weights": 21}
    runs = (world / "stage1/checkpoints/best", path.with_suffix("") / "checkpoints/latest")
    before, after = (load_file(run / "mapper.safetensors")["head.weight"] for run in runs)
    assert (before - after).abs().max() > 0.1


def test_a_checkpoint_of_zero_3_holds_the_mapper_alone_and_needs_no_deepspeed(zero_run: Path, shard_set: Path) -> None:
    folder = zero_run / "checkpoints/latest"
    code = (
        "import sys, torch; from sm_train.models.mapper import SpeechMapper; "
        f"mapper = SpeechMapper.from_pretrained({str(folder)!r}); assert 'deepspeed' not in sys.modules; "
        "print(float(mapper(torch.ones(1, 20, 32), torch.tensor([20])).double().sum()))"
    )
    done = training.run_command([sys.executable, "-c", code])
    assert done.returncode == 0, done.stderr
    mapper = SpeechMapper.from_pretrained(folder)
    with torch.no_grad():
        assert float(done.stdout) == float(mapper(torch.ones(1, 20, 32), torch.tensor([20])).double().sum())
    names = set(dict(mapper.named_parameters()))
    assert set(load_file(folder / "mapper.safetensors")) == names
    moments = load_file(folder / "moments.safetensors")
    assert set(moments) == {f"{kind}.{name}" for kind in ("exp_avg", "exp_avg_sq") for name in names}
    assert sum(path.stat().st_size for path in folder.iterdir()) < 2 * 3 * 4 * mapper.num_parameters + 20_000


# ---- killed and started again


@pytest.fixture(scope="module")
def stopped_run(world: Path, shard_folder: Path) -> Path:
    """The config of a ZeRO-3 run on two ranks that was killed in step 5: its checkpoint is of step 4."""
    path = config(world, "stopped", world, shard_folder)

    def work() -> None:
        if os.environ["RANK"] == "0":
            training.kill_at_step(6, path.with_suffix(""), saved=4)
        tuning.train(path, "engine.timeout_s=20")

    assert training.in_ranks(2, work)[0] == -signal.SIGKILL
    assert json.loads((path.with_suffix("") / "checkpoints/latest/state.json").read_text())["global_step"] == 4
    return path


def copy_of(stopped: Path, folder: Path, world: Path, shard_folder: Path) -> Path:
    path = config(folder, "resumed", world, shard_folder)
    shutil.copytree(stopped.with_suffix(""), path.with_suffix(""), symlinks=True)
    return path


def test_a_killed_run_goes_on_bit_equal(
    stopped_run: Path, zero_run: Path, world: Path, shard_folder: Path, tmp_path: Path
) -> None:
    """Also where each node reads the LLM from its own disk from then on."""
    path, local = copy_of(stopped_run, tmp_path, world, shard_folder), tmp_path / "scratch"
    assert training.in_ranks(2, lambda: tuning.train(path, f"llm_stage_to={local}")) == [0, 0]
    assert len(list(local.glob("*/staged.json"))) == 1
    training.assert_equal(
        *(training.tensors_of(run / "checkpoints/latest") for run in (tmp_path / "resumed", zero_run))
    )
    lines, expected = training.metrics(tmp_path / "resumed"), training.metrics(zero_run)
    same = ("step", "loss", "loss_ce", "accuracy", "grad_norm", "padding", "epoch", "valid_loss", "valid_wer")
    assert [{n: line.get(n) for n in same} for line in lines] == [{n: line.get(n) for n in same} for line in expected]
    assert [line["attempt"] for line in lines] == [1] * 4 + [2] * 4


@pytest.mark.parametrize("words", [REPLICATED, ZERO_3], ids=["replicated", "zero3"])
def test_a_killed_run_goes_on_with_one_rank(
    stopped_run: Path, zero_run: Path, world: Path, shard_folder: Path, tmp_path: Path, words: tuple[str, ...]
) -> None:
    path = copy_of(stopped_run, tmp_path, world, shard_folder)
    assert training.in_ranks(1, lambda: tuning.train(path, *words)) == [0]
    assert_close_run(tmp_path / "resumed", zero_run)


def test_a_finished_run_is_left_alone(local_run: Path) -> None:
    def contents() -> dict[str, tuple[int, str]]:
        paths = sorted(path for path in local_run.rglob("*") if path.is_file())
        return {str(p): (p.stat().st_mtime_ns, hashlib.sha256(p.read_bytes()).hexdigest()) for p in paths}

    before = contents()
    assert training.in_ranks(1, lambda: tuning.train(local_run.with_suffix(".yaml"), *REPLICATED)) == [0]
    assert contents() == before


# ---- a person's mistakes: one line before the first step, exit code 2


def fails(path: Path, *words: str) -> str:
    """What the command prints where it ends with exit code 2; the LLM is not loaded."""
    out = path.with_suffix(".err")

    def unloaded(*args: object, **how: object) -> object:
        raise AssertionError("the LLM is loaded before the mistake is found")

    def work() -> None:
        tune.load_model = unloaded  # type: ignore[assignment]
        sys.argv = ["tune", str(path), *words]
        with out.open("w") as sys.stderr:
            try:
                errors.run_command(tune.main)
            except SystemExit as left:
                sys.stderr.flush()
                os._exit(int(left.code or 0))

    assert training.in_ranks(1, work) == [2], out.read_text()
    text = out.read_text()
    assert text.count("\n") == 1
    assert text.startswith("error: ")
    return text


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["placement=zero4"], ["placement is 'zero4'", "replicated"]),
        (["tasks={asr: 0, sqa: 0}"], ["shares above 0"]),
        (["tasks.asr=.nan"], ["shares above 0"]),
        (["llm_revision=abc"], ["llm_revision is 'abc' without an llm"]),
        (["placement=replicated", "engine.zero_stage=3"], ["engine.zero_stage is 3"]),
        (["splice=half"], ["splice is 'half'; it must be one of all, text"]),
        (["lora.rank=2"], ["lora.rank is 2 with placement zero3; it needs replicated"]),
        (["mapper=scratch"], ["shape.widths[0] is 1024, but the encoder's features are 32 wide"]),
        (["splits=[train,tset]"], ["no utterance in split 'tset'", "dev, train"]),
        (["tasks={asr: 1, st-xx: 1}"], ["no task 'st-xx'", "asr, sqa"]),
        (["objective.sigma=1"], ["objective.sigma is 1"]),
        (["batch.tokens=20"], ["'utt-", "padded tokens", "budget of 20", "batch.tokens"]),
        (["batch.lanes=0"], ["batch.lanes is 0"]),
        (["max_answer_tokens=3"], ["answers have more than max_answer_tokens 3", "utt-"]),
        (["mapper=/nowhere"], ["/nowhere"]),
        (["prompts=/nowhere"], ["/nowhere"]),
        (["llm=/nowhere"], ["/nowhere"]),
        (["target=llama"], ["no complete target set 'llama'", "tiny"]),
        (["splits=[test]"], ["no utterance in split 'test'"]),
        (["engine.precision=fp8"], ["engine.precision is 'fp8'"]),
    ],
)
def test_a_mistake_is_one_line(
    world: Path, shard_folder: Path, tmp_path: Path, words: list[str], expected: list[str]
) -> None:
    text = fails(config(tmp_path, "run", world, shard_folder, tasks={"asr": 1.0, "sqa": 1.0}), *words)
    for part in expected:
        assert part in text


def test_a_prompt_without_speech_is_refused(world: Path, shard_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.yaml").write_text(json.dumps({"asr": {"train": ["Say it."]}}))
    text = fails(config(tmp_path, "run", world, shard_folder), f"prompts={tmp_path / 'prompts.yaml'}")
    assert "'Say it.' has 0 {speech} placeholders" in text


def test_a_prompt_whose_variable_no_task_has_is_refused(world: Path, shard_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.yaml").write_text(json.dumps({"asr": {"train": ["{speech}\n{tone}?"]}}))
    words = (f"prompts={tmp_path / 'prompts.yaml'}", "splits=[train]")
    text = fails(config(tmp_path, "run", world, shard_folder, tasks={"asr": 1.0}), *words)
    assert "no value for {tone}" in text


def test_another_llm_s_tokenizer_is_refused(world: Path, shard_folder: Path, llm_folder: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(llm_folder, tmp_path / "other"))
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:-3]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    text = fails(config(tmp_path, "run", world, shard_folder), f"llm={other}")
    assert "tokenizer_hash" in text
    assert str(llm_folder) in text


def test_another_llm_s_embedding_is_refused(world: Path, shard_folder: Path, llm_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    other = Path(shutil.copytree(llm_folder, tmp_path / "other"))
    tensors = load_file(other / "model.safetensors")
    tensors["model.embed_tokens.weight"][20:] += 0.01
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    assert "does not embed tokens" in fails(config(tmp_path, "run", world, shard_folder), f"llm={other}")


@pytest.mark.parametrize(
    ("file", "change", "expected"),
    [
        ("config.json", {"max_position_embeddings": 30}, "takes rows of 30 tokens, but the longest prompt"),
        ("config.json", {"attention_dropout": 0.1}, "has attention_dropout 0.1 in its config"),
    ],
)
def test_an_llm_that_cannot_be_trained_through_is_refused(
    world: Path,
    shard_folder: Path,
    llm_folder: Path,
    tmp_path: Path,
    file: str,
    change: dict[str, object],
    expected: str,
) -> None:
    other = Path(shutil.copytree(llm_folder, tmp_path / "other"))
    (other / file).write_text(json.dumps({**json.loads((other / file).read_text()), **change}))
    text = fails(config(tmp_path, "run", world, shard_folder), f"llm={other}", "checkpoint_activations=true")
    assert expected in text


def test_another_chat_template_is_refused(world: Path, shard_folder: Path, llm_folder: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(llm_folder, tmp_path / "other"))
    (other / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}</s>{% endfor %}")
    text = fails(config(tmp_path, "run", world, shard_folder), f"llm={other}")
    assert "another chat template" in text
    assert "cluster.retarget" in text


def test_another_training_of_the_llm_is_refused_on_resume(
    local_run: Path, world: Path, shard_folder: Path, llm_folder: Path, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    other = Path(shutil.copytree(llm_folder, tmp_path / "other"))
    tensors = load_file(other / "model.safetensors")
    save_file({n: t if "embed" in n else t + 0.1 for n, t in tensors.items()}, other / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    path = copy_of(local_run.with_suffix(".yaml"), tmp_path, world, shard_folder)
    text = fails(path, *REPLICATED, f"llm={other}")
    assert "llm is " in text
    shutil.rmtree(tmp_path / "resumed")
    assert training.in_ranks(1, lambda: tuning.train(path, *REPLICATED, f"llm={other}", "loop.steps=2")) == [0]
    state = json.loads((tmp_path / "resumed/checkpoints/latest/state.json").read_text())["contract"]
    assert state["llm"] == str(other)


def test_a_run_of_stage_1_is_not_tuned_in_place(world: Path, shard_folder: Path, tmp_path: Path) -> None:
    text = fails(config(tmp_path, "run", world, shard_folder), f"run={world / 'stage1'}")
    assert "stage1 is not a run of tune" in text


def test_ranks_that_found_different_mappers_stop_before_the_llm_is_loaded(
    world: Path, shard_folder: Path, tmp_path: Path
) -> None:
    other = tuning.pretrained(tmp_path / "other", shard_folder, seed=5)
    path = config(tmp_path, "run", world, shard_folder)

    def work() -> None:
        tune.load_model = None  # type: ignore[assignment]
        find = origin.checkpoint.find
        if os.environ["RANK"] == "1":
            origin.checkpoint.find = lambda _path: find(other)
        with pytest.raises(errors.UserError, match="its ranks have read different checkpoints"):
            tuning.train(path)

    assert training.in_ranks(2, work) == [0, 0]


def test_a_mapper_of_another_width_is_refused(world: Path, shard_folder: Path, tmp_path: Path) -> None:
    other = tuning.pretrained(tmp_path / "other", shard_folder, width=20)
    text = fails(config(tmp_path, "run", world, shard_folder), f"mapper={other}")
    assert "gives vectors of 20 numbers, this LLM takes 16" in text


def test_a_share_of_zero_leaves_a_task_out(world: Path, shard_folder: Path, tmp_path: Path) -> None:
    path = config(tmp_path, "run", world, shard_folder)
    assert training.load(path, "tasks.asr=0", "tasks.st-fr=2", stage=tune).shares == {"sqa": 0.5, "st-fr": 2.0}
    assert training.load(path, "tasks={asr: 0, st-fr: 2}", stage=tune).shares == {"st-fr": 2.0}


def test_a_dumped_config_can_be_placed_otherwise(zero_run: Path) -> None:
    cfg = training.load(zero_run / "config.yaml", *REPLICATED, stage=tune)
    assert (cfg.placed.name, cfg.placed.zero_stage) == ("local", 1)


def test_a_target_set_without_tasks_names_the_command(world: Path, shard_folder: Path, tmp_path: Path) -> None:
    bare = Path(shutil.copytree(shard_folder, tmp_path / "bare"))
    (bare / "targets/tiny/tasks.parquet").unlink()
    text = fails(config(tmp_path, "run", world, bare))
    assert f"python -m cluster.retarget {bare} --name tiny --instructions" in text


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("seed=7", ["seed is 0 there, but 7 is asked for"]),
        ("objective.sigma=0.5", ["objective.sigma is 0.9 there, but 0.5"]),
        ("tasks.asr=0.3", ["tasks is {'asr': 1.0, 'sqa': 0.5} there"]),
        ("batch.tokens=200", ["batch.tokens is 300 there, but 200"]),
    ],
)
def test_a_changed_setting_is_named_with_both_values(
    local_run: Path, world: Path, shard_folder: Path, tmp_path: Path, word: str, expected: list[str]
) -> None:
    path = copy_of(local_run.with_suffix(".yaml"), tmp_path, world, shard_folder)
    text = fails(path, word, *REPLICATED)
    for part in [*expected, "give another run folder"]:
        assert part in text


def test_load_model_freezes(llm_folder: Path) -> None:
    model = load_model(str(llm_folder), None, "bfloat16")
    assert not model.training
    assert {(p.requires_grad, p.dtype) for p in model.parameters()} == {(False, torch.bfloat16)}
