"""Evaluation and ask through the command line, on tiny random models: files, repetition, mistakes."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sm_train import ask, config, evaluate, files, report
from sm_train.chat import Chat
from sm_train.data.target_set import TargetSet
from sm_train.errors import LOST, UserError
from sm_train.models.mapper import MapperConfig, SpeechMapper
from sm_train.scoring import answers, mappers, robustness
from sm_train.scoring.kept import FOLDER
from sm_train.train import checkpoint
from tests import builders, training

pytestmark = pytest.mark.slow

MESSAGES = ("Say.\n{speech}", "In {target_language}.\n{speech}")


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, shard_set: Path, manifest: Path) -> Path:
    """A config of evaluation beside a run with one checkpoint of an untrained mapper."""
    folder = tmp_path_factory.mktemp("evaluate")
    targets = TargetSet(shard_set, "tiny")
    dataset = files.read_json(shard_set / "dataset.json")
    torch.manual_seed(0)
    width = dataset["width"]
    settings = MapperConfig(widths=[width, 16, 16], layers=1, heads=2, feed_forward=16)
    mapper = SpeechMapper(settings, width, targets.rows_RD.shape[1])
    step = folder / "run" / "checkpoints" / "step-1"
    step.mkdir(parents=True)
    save_file(dict(mapper.state_dict()), step / "mapper.safetensors")
    files.write_json(step / "config.json", mapper.description())
    frozen = {name: dataset[name] for name in ("encoder", "encoder_revision", "layer", "pool")}
    contract = {**frozen, "encoder_hash": dataset["encoder_hash"], "llm": targets.contract["llm"], "llm_revision": None}
    files.write_json(step / "state.json", {"global_step": 1, "contract": contract})
    (folder / "run" / "checkpoints" / "latest").symlink_to("step-1")
    run_config = {"shards": str(shard_set), "target": "tiny", "trim": "change_point"}
    (folder / "run" / "config.yaml").write_text(json.dumps(run_config))
    prompts = {task: {"train": [message]} for task, message in zip(("asr", "st"), MESSAGES, strict=True)}
    (folder / "prompts.yaml").write_text(json.dumps(prompts))
    ids = [row["id"] for row in utterances(shard_set) if row["split"] == "dev"]
    tasks = [{"utterance_id": i, "task": "asr", "target_lang": "en", "answer": "the answer"} for i in ids]
    tasks.append({"utterance_id": ids[0], "task": "st", "target_lang": "fr", "answer": "la réponse"})
    (folder / "tasks.jsonl").write_text("".join(json.dumps(task) + "\n" for task in tasks))
    values = {
        "run": str(folder / "run"),
        "shards": str(shard_set),
        "target": "tiny",
        "splits": ["dev"],
        "instructions": str(folder / "tasks.jsonl"),
        "prompts": str(folder / "prompts.yaml"),
        "llm": {"path": targets.contract["llm"], "device": "cpu"},
        "audio_root": str(manifest.parent),
        "max_new_tokens": 4,
    }
    (folder / "config.yaml").write_text(json.dumps(values))
    return folder


@pytest.fixture
def tuned(job: Path, tmp_path: Path) -> Path:
    """A run of stage 2: the run of stage 1 with other weights and the contract of a tuning."""
    from transformers import AutoTokenizer

    shutil.copytree(job / "run" / "checkpoints", tmp_path / "tuned" / "checkpoints", symlinks=True)
    step = tmp_path / "tuned" / "checkpoints" / "step-1"
    weights = load_file(step / "mapper.safetensors")
    save_file({name: 1.5 * tensor for name, tensor in weights.items()}, step / "mapper.safetensors")
    values = config.read_yaml(job / "config.yaml")
    chat = Chat(AutoTokenizer.from_pretrained(values["llm"]["path"]))
    rendered = {f"rendered.{message}": chat.halves(message) for message in MESSAGES}
    tuning = {"stage": "tune", "tasks": {"st-fr": 0.5, "asr": 0.5, "sqa": 0.0}, "objective.sigma": 0.9, **rendered}
    edit_contract(tmp_path / "tuned", **tuning)
    (tmp_path / "tuned" / "config.yaml").write_text(json.dumps({"shards": values["shards"], "target": "tiny"}))
    return tmp_path / "tuned"


def edit_contract(run: Path, **changes: object) -> None:
    path = run / "checkpoints" / "step-1" / "state.json"
    state = files.read_json(path)
    files.write_json(path, {**state, "contract": {**state["contract"], **changes}})


def with_another_template(run: Path) -> None:
    """As if the template of the LLM had ended its prompts otherwise when the run was tuned."""
    state = files.read_json(run / "checkpoints" / "step-1" / "state.json")
    key = f"rendered.{MESSAGES[1]}"
    prefix, suffix = state["contract"][key]
    edit_contract(run, **{key: [prefix, [*suffix, 5]]})


def utterances(shard_set: Path) -> list[dict[str, object]]:
    from sm_train.data.shards import read_table

    rows: list[dict[str, object]] = read_table(shard_set, "utterances.parquet").to_pylist()
    return rows


def test_evaluation_writes_its_files_once(job: Path) -> None:
    first = builders.run_module("sm_train.evaluate", job / "config.yaml")
    assert first.returncode == 0, first.stderr
    results = files.read_json(job / "run" / "results.json")
    assert {r["system"] for r in results} == {"topline", "stage 1", "stage 1, no LLM"}
    hypotheses = (job / "run" / "hypotheses.jsonl").read_text().splitlines()
    asked = [json.loads(line)["task"] for line in (job / "tasks.jsonl").read_text().splitlines()]
    assert len(hypotheses) == 2 * len(asked) + asked.count("asr")
    assert {r["task"] for r in results if r["metric"] == "in language"} == {"st-fr"}
    assert "py3langid:" in next(r["signature"] for r in results if r["metric"] == "in language")
    page = (job / "run" / "report.html").read_text()
    assert "data:audio/" in page
    assert "<svg" in page
    stamp = (job / "run" / "results.json").stat().st_mtime_ns
    second = builders.run_module("sm_train.evaluate", job / "config.yaml", "llm.stage_to=/nowhere")
    assert "evaluated already" in second.stdout
    assert (job / "run" / "results.json").stat().st_mtime_ns == stamp


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("checkpoint=nowhere", "has no checkpoint 'nowhere'"),
        ("splits=[moon]", "no utterance in split 'moon'"),
        ("llm.path=./nowhere", "the folder does not exist"),
        ("cascade=/nowhere", "set cascade: null"),
        ("instructions=/nowhere.parquet", "/nowhere.parquet does not exist"),
        ("prompt_group=held_out", "no held_out prompts for the task 'asr'"),
        ("trim=sometimes", "trim is 'sometimes'"),
        ("tuned=[/nowhere]", "run /nowhere does not exist"),
        ("lexicon=/nowhere.json", "/nowhere.json does not exist"),
        ("prompt_group=another", "prompt_group is 'another'; it must be train, held_out or both"),
        ("paraphrases=some", "paraphrases is 'some'"),
        ("run=null", "run is null and so is out"),
    ],
)
def test_a_mistake_is_one_line(job: Path, override: str, line: str) -> None:
    with pytest.raises(UserError, match=re.escape(line)) as caught:
        evaluate.main([str(job / "config.yaml"), override])
    assert "\n" not in str(caught.value)


def test_ask_answers_about_a_recording(job: Path, manifest: Path) -> None:
    recording = sorted((manifest.parent / "audio").iterdir())[0]
    done = builders.run_module("sm_train.ask", job / "run", recording, "What is said?")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("heard:")
    assert "answer:" in done.stdout


def test_ask_refuses_what_is_no_recording(job: Path) -> None:
    with pytest.raises(UserError, match="undecodable"):
        ask.main([str(job / "run"), str(job / "tasks.jsonl"), "What is said?"])


def test_a_tuned_run_is_one_more_system(job: Path, tuned: Path, tmp_path: Path) -> None:
    shutil.copytree(job / "run", tmp_path / "run", symlinks=True)
    (tmp_path / "words.json").write_text(json.dumps({"fr": ["le"], "en": ["the"]}))
    keys = [f"run={tmp_path / 'run'}", f"tuned=[{tuned}]", f"lexicon={tmp_path / 'words.json'}"]
    first = builders.run_module("sm_train.evaluate", job / "config.yaml", *keys)
    assert first.returncode == 0, first.stderr
    results = files.read_json(tmp_path / "run" / "results.json")
    named = "stage 2 ASR/ST-FR-CE+MSE"
    assert [*dict.fromkeys(r["system"] for r in results)] == [
        "topline", "stage 1", "stage 1, no LLM", named, f"{named}, no LLM"
    ]  # fmt: skip
    assert "in language" in {r["metric"] for r in results if r["system"] == named}
    assert named in (tmp_path / "run" / "report.html").read_text()
    assert "evaluated already" in builders.run_module("sm_train.evaluate", job / "config.yaml", *keys).stdout
    described = files.read_json(tmp_path / "run" / "evaluation.json")
    assert set(described["mappers"]) == {"stage 1", named}
    cfg = config.load(evaluate.EvaluateConfig, [str(job / "config.yaml"), *keys], "sm_train.evaluate")
    (tmp_path / "words.json").write_text(json.dumps({"fr": ["la"]}))
    mapper = tuned / "checkpoints" / "step-1" / "mapper.safetensors"
    save_file({name: 2 * tensor for name, tensor in load_file(mapper).items()}, mapper)
    trained = mappers.read_all([(run, checkpoint.find(run)) for run in (tmp_path / "run", tuned)])
    now = evaluate._described(cfg, trained)
    assert {name for name in now if now[name] != described[name]} == {"lexicon", "mappers"}
    assert now["mappers"]["stage 1"] == described["mappers"]["stage 1"]


def test_a_tuned_run_of_another_template_needs_a_word(
    job: Path, tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Reached(Exception):
        pass

    def reach(*_: object) -> None:
        raise Reached

    monkeypatch.setattr(evaluate, "answer_all", reach)
    keys = [str(job / "config.yaml"), f"tuned=[{tuned}]", f"run={tmp_path / 'run'}"]
    shutil.copytree(job / "run", tmp_path / "run", symlinks=True)
    with pytest.raises(Reached):
        evaluate.main(keys)
    with_another_template(tuned)
    with pytest.raises(UserError, match=r"In \{target_language\}.*set other_template: true") as caught:
        evaluate.main(keys)
    assert "\n" not in str(caught.value)
    with pytest.raises(Reached):
        evaluate.main([*keys, "other_template=true"])


def test_a_tuned_run_of_another_encoder_is_refused(job: Path, tuned: Path, tmp_path: Path) -> None:
    edit_contract(tuned, encoder_hash="another")
    shutil.copytree(job / "run", tmp_path / "run", symlinks=True)
    with pytest.raises(UserError, match="encoder_hash is 'another' there"):
        evaluate.main([str(job / "config.yaml"), f"tuned=[{tuned}]", f"run={tmp_path / 'run'}"])


def test_ask_hears_a_tuned_run_by_its_own_template_alone(tuned: Path, manifest: Path) -> None:
    recording = sorted((manifest.parent / "audio").iterdir())[0]
    heard, _said = ask.answer(tuned, recording, "What is said?", max_new_tokens=2)
    assert heard
    with_another_template(tuned)
    with pytest.raises(UserError, match="renders the prompt"):
        ask.answer(tuned, recording, "What is said?", max_new_tokens=2)


@pytest.mark.parametrize("name", ["prompts.yaml", "tasks.jsonl"])
def test_what_changed_in_place_is_evaluated_anew(job: Path, name: str) -> None:
    cfg = config.load(evaluate.EvaluateConfig, [str(job / "config.yaml")], "sm_train.evaluate")
    step = job / "run" / "checkpoints" / "step-1"
    trained = [mappers.read(job / "run", step)]
    before, text = evaluate._described(cfg, trained), (job / name).read_text()
    (job / name).write_text(text + "\n")
    assert evaluate._described(cfg, trained) != before
    (job / name).write_text(text)
    assert evaluate._described(cfg, trained) == before


WORDS = ["batch_size=1", "threads=1", "prompt_group=both", "examples=2"]


@pytest.fixture(scope="module")
def alone(job: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of one rank on both groups of prompts, in a folder of their own."""
    prompts = config.read_yaml(job / "prompts.yaml")
    for groups in prompts.values():
        groups["held_out"] = [f"Please. {message}" for message in groups["train"]]
    (job / "both.yaml").write_text(json.dumps(prompts))
    out = tmp_path_factory.mktemp("alone")
    evaluate.main(words(job, out))
    return out


def words(job: Path, out: Path) -> list[str]:
    return [str(job / "config.yaml"), *WORDS, f"prompts={job / 'both.yaml'}", f"out={out}"]


def same_bytes(one: Path, other: Path) -> None:
    for name in ("hypotheses.jsonl", "results.json", "report.html"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    tokens = [files.read_json(folder / "evaluation.json")["llm_tokens"] for folder in (one, other)]
    assert tokens[0] == tokens[1]


def test_both_groups_and_what_it_took(alone: Path) -> None:
    results = files.read_json(alone / "results.json")
    assert {(r["system"], r["prompts"]) for r in results} >= {("stage 1", "train"), ("stage 1", "held_out")}
    took, seconds = files.read_json(alone / "evaluation.json")["llm_tokens"], files.read_json(alone / "timing.json")
    assert set(took) == set(seconds) == {"topline", "stage 1"}
    for tokens in took.values():
        assert 0 < tokens["speech_positions"] < tokens["prompt_tokens"]
        assert tokens["answer_tokens"] > 0
    assert all(value > 0 for of_system in seconds.values() for value in of_system.values())
    assert not (alone / "checkpoints").exists()
    assert not list(alone.glob(".aside-*"))


def test_two_ranks_write_what_one_does(job: Path, alone: Path, tmp_path: Path) -> None:
    out = tmp_path / alone.name  # the page's title is the folder's name
    assert training.in_ranks(2, lambda: evaluate.main(words(job, out)), timeout_s=300) == [0, 0]
    same_bytes(alone, out)


def kept_in(out: Path) -> list[Path]:
    """The files of answers that are kept there."""
    return [path for path in out.glob(f"{FOLDER}-*/*.jsonl") if path.stat().st_size]


def test_a_lost_rank_ends_all_and_the_same_command_goes_on(job: Path, alone: Path, tmp_path: Path) -> None:
    out = tmp_path / alone.name

    def lose_rank_1() -> None:
        real = answers._answered

        def lost(*args: object) -> object:
            if os.environ["RANK"] == "1" and kept_in(out):
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args)

        answers._answered = lost
        evaluate.main(words(job, out))

    assert training.in_ranks(2, lose_rank_1, timeout_s=300) == [LOST, -signal.SIGKILL]
    assert not (out / "evaluation.json").exists()
    assert kept_in(out)
    evaluate.main(words(job, out))
    same_bytes(alone, out)


def test_what_is_kept_is_not_asked_again(
    job: Path, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupted(Exception):
        pass

    out, real, left = tmp_path / alone.name, answers._answered, [3]

    def answer(*args: object) -> object:
        left[0] -= 1
        if left[0] < 0:
            raise Interrupted
        return real(*args)

    monkeypatch.setattr(answers, "_answered", answer)
    with pytest.raises(Interrupted):
        evaluate.main(words(job, out))
    pieces = 2 * 5  # two systems, 18 questions in batches of one, four to a piece
    left[0] = pieces - 3
    evaluate.main(words(job, out))
    assert left == [0]
    same_bytes(alone, out)


def test_a_mistake_costs_no_answer(job: Path, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, real = tmp_path / alone.name, answers._answered
    evaluate.main(words(job, out))
    done = (out / "evaluation.json").read_bytes()
    with pytest.raises(UserError, match="the folder does not exist"):
        evaluate.main([*words(job, out), "llm.path=./nowhere"])
    assert (out / "evaluation.json").read_bytes() == done
    (out / "evaluation.json").unlink()

    def answer(*args: object) -> object:
        if kept_in(out):
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(answers, "_answered", answer)
    with pytest.raises(KeyboardInterrupt):
        evaluate.main(words(job, out))
    before = kept_in(out)
    with pytest.raises(UserError):
        evaluate.main([*words(job, out), f"prompts={tmp_path / 'nowhere.yaml'}"])
    with pytest.raises(KeyboardInterrupt):
        evaluate.main([*words(job, out), "threads=2"])  # no answer follows from it: the same pieces
    assert kept_in(out) == before


def test_another_llm_is_another_evaluation(job: Path, tmp_path: Path) -> None:
    cfg = config.load(evaluate.EvaluateConfig, words(job, tmp_path), "test")
    llm = Path(shutil.copytree(cfg.llm.path, tmp_path / "llm"))
    copied = dataclasses.replace(cfg, llm=dataclasses.replace(cfg.llm, path=str(llm)))
    before = evaluate._described(copied, [])
    weights = load_file(llm / "model.safetensors")
    name = next(name for name in weights if "q_proj" in name)
    save_file({**weights, name: 2 * weights[name]}, llm / "model.safetensors", {"format": "pt"})
    assert {key for key, value in evaluate._described(copied, []).items() if value != before[key]} == {"llm"}


def test_references_alone_and_a_mapper_alone(job: Path, alone: Path, tmp_path: Path) -> None:
    evaluate.main([*words(job, tmp_path / "references"), "run=null"])
    evaluate.main([*words(job, tmp_path / "mapper"), "references=false"])
    parts = [files.read_json(tmp_path / name / "results.json") for name in ("references", "mapper")]
    assert {r["system"] for r in parts[0]} == {"topline"}
    assert [*parts[0], *parts[1]] == files.read_json(alone / "results.json")


def test_results_and_report_again_from_hypotheses(
    job: Path, alone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / alone.name
    report.main(["--from-hyps", str(alone / "hypotheses.jsonl"), "--to", str(out)])
    assert "stage 1, no LLM" in capsys.readouterr().out
    for name in ("hypotheses.jsonl", "results.json", "report.html"):
        assert (out / name).read_bytes() == (alone / name).read_bytes(), name
    with pytest.raises(UserError, match="holds another evaluation; name another folder with --to"):
        report.main(["--from-hyps", str(out / "hypotheses.jsonl"), "--to", str(alone)])
    with pytest.raises(UserError, match="was scored with normaliser mms"):
        report.main(["--from-hyps", str(alone / "hypotheses.jsonl"), "--normaliser", "none"])
    shutil.copytree(alone, tmp_path / "moved")
    done = files.read_json(alone / "evaluation.json")
    done["settings"]["shards"] = done["settings"]["run"] = str(tmp_path / "nowhere")
    files.write_json(tmp_path / "moved" / "evaluation.json", done)
    report.main(["--from-hyps", str(tmp_path / "moved" / "hypotheses.jsonl")])
    assert "left out of the report" in capsys.readouterr().err
    assert (tmp_path / "moved" / "results.json").read_bytes() == (alone / "results.json").read_bytes()
    pages = [(folder / "report.html").read_text() for folder in (alone, tmp_path / "moved")]
    assert ["data:audio/" in page for page in pages] == [True, False]
    assert all("held-out prompts" in page for page in pages)


def test_every_wording_is_asked_and_told_apart(
    job: Path, alone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = config.read_yaml(job / "prompts.yaml")
    for groups in prompts.values():
        groups["held_out"] = [f"{word} {message}" for word in ("Please.", "Now.") for message in groups["train"]]
    (tmp_path / "prompts.yaml").write_text(json.dumps(prompts))
    out, asked = tmp_path / "out", ["prompt_group=held_out", "paraphrases=all", "references=false"]
    evaluate.main([*words(job, out), *asked, f"prompts={tmp_path / 'prompts.yaml'}"])
    assert "by wording of the prompt:" in capsys.readouterr().out
    entries = robustness.read(out / robustness.FILE)
    assert {entry.task for entry in entries if entry.system == "stage 1"} == {"asr", "st-fr"}
    for entry in entries:
        assert list(entry.by_prompt) == prompts[entry.task.partition("-")[0]]["held_out"]
        assert entry.paired
    report.main(["--from-hyps", str(out / "hypotheses.jsonl"), "--to", str(tmp_path / "again")])
    assert (tmp_path / "again" / robustness.FILE).read_bytes() == (out / robustness.FILE).read_bytes()
    assert not (alone / robustness.FILE).exists()
