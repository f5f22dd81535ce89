"""What a run has spent: formulas against sums by hand, and a run folder's own numbers."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from sm_train import files
from sm_train.data import instructions, shards
from sm_train.data.lengths import num_positions
from sm_train.errors import UserError
from sm_train.models.mapper import MapperConfig
from tests import training
from tools.plan_capacity.hardware import Llama, Mapper
from tools.reproduce import compute

SHAPE = MapperConfig(widths=[16, 16, 32], layers=1, heads=2, feed_forward=32)
LLM = {"num_hidden_layers": 2, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 50}
ITEMS, STEPS, TOKENS = 6, 5, 30.0


def test_the_llms_flops_by_hand() -> None:
    llm = Llama(layers=2, width=8, heads=2, kv_heads=2, feed_forward=16, vocabulary=50)
    layer = 4 * 8 * 8 + 3 * 8 * 16 + 2 * 8
    attention = 2 * (
        3 * (2 * 2 * 8 * 20)
    )  # layers x (forward once, backward twice) x two products of width 8, length 20
    head = 4 * 50 * 8 * 7
    assert compute.llm_flop(llm, 100, 20, 7) == 100 * (4 * 2 * layer + attention) + head
    assert compute.llm_flop(llm, 100, 20, 7, adapter=64) == compute.llm_flop(llm, 100, 20, 7) + 6 * 64 * 100


def test_the_mappers_flops_count_its_first_stack_twice() -> None:
    mapper = Mapper(SHAPE, 24)
    attention = 3 * (
        2 * (4 * 20 * 16) + 4 * 10 * 16
    )  # 20 frames of the first stack a position's place, 10 of the second
    assert compute.mapper_flop(mapper, 1, 10) == 6 * mapper.multiplications + attention


def run_folder(tmp_path: Path, *, tuned: bool) -> Path:
    """A run of two starts, ten seconds each of them at work, an hour apart."""
    shard_set, run = training.shard_set(tmp_path / "set"), tmp_path / "run"
    checkpoint, began = run / "checkpoints" / "latest", 1_750_000_000.0
    target = shard_set / "targets" / training.TARGET
    cfg = {"shards": str(shard_set), "target": training.TARGET, "splits": ["train"]}
    if tuned:
        (tmp_path / "llm").mkdir()
        files.write_json(tmp_path / "llm" / "config.json", LLM)
        rows = [{"task": task, "target_lang": "en", "num_answer_tokens": n} for task, n in (("asr", 4), ("sqa", 2))]
        instructions.write_tasks(target, rows, {})
        cfg |= {"llm": str(tmp_path / "llm"), "tasks": {"asr": 1.0, "sqa": 3.0, "st": 0.0}}
    files.write_json(run / "config.yaml", cfg)  # JSON is YAML
    files.write_json(checkpoint / "config.json", {"mapper": vars(SHAPE), "output_width": training.D})
    lines = []
    for attempt, (start, steps) in enumerate(((began, (1, 2)), (began + 3600, (3, 4, 5))), start=1):
        said = {"attempt": attempt, "started": at(start), "began": at(start), "ended": at(start + 10), "how": "SIGTERM"}
        files.write_json(run / "attempts" / f"{attempt}.json", {**said, "from_step": steps[0] - 1, "found": {}})
        for step in steps:
            tokens = {"llm_tokens": TOKENS} if tuned else {}
            time_s = start + 10 * (step - steps[0] + 1) / len(steps)
            lines.append({"attempt": attempt, "step": step, "time_s": time_s, "num_items": ITEMS, **tokens})
    files.write_text(run / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    return run


def at(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def mean_positions(run: Path) -> float:
    rows = shards.read_table(run.parent / "set", "utterances.parquet").to_pylist()
    return float(np.mean([num_positions(row["num_frames"]) for row in rows if row["split"] == "train"]))


def test_stage_1_spends_no_tokens_and_the_hour_between_starts_does_not_count(tmp_path: Path) -> None:
    run = run_folder(tmp_path, tuned=False)
    found, length = compute.of_run(run), mean_positions(run)
    assert found.llm_tokens == 0
    assert found.minutes == pytest.approx(20 / 60)
    assert found.flop == pytest.approx(compute.mapper_flop(Mapper(SHAPE, training.D), ITEMS * STEPS * length, length))


def test_tuning_adds_the_llm_its_head_where_answers_are_and_its_adapter(tmp_path: Path) -> None:
    run = run_folder(tmp_path, tuned=True)
    found, length, items = compute.of_run(run), mean_positions(run), ITEMS * STEPS
    llm = Llama(layers=2, width=8, heads=2, kv_heads=2, feed_forward=16, vocabulary=50)
    of_mapper = compute.mapper_flop(Mapper(SHAPE, training.D), items * length, length)
    of_llm = compute.llm_flop(llm, items * TOKENS, TOKENS, items * 2.5)  # one part of 4 tokens, three of 2
    assert found.llm_tokens == items * TOKENS
    assert found.flop == pytest.approx(of_mapper + of_llm)
    save_file({"a": np.zeros((8, 4), np.float32)}, run / "checkpoints" / "latest" / "adapter_model.safetensors")
    assert compute.of_run(run).flop - found.flop == pytest.approx(6 * 32 * items * TOKENS)


def test_a_run_that_counted_no_items_is_refused(tmp_path: Path) -> None:
    run = run_folder(tmp_path, tuned=False)
    path = run / "metrics.jsonl"
    path.write_text(path.read_text().replace("num_items", "items_then"))
    with pytest.raises(UserError, match="num_items"):
        compute.of_run(run)


def test_an_evaluation_that_counted_nothing_says_nothing(tmp_path: Path) -> None:
    assert compute.of_evaluation(tmp_path) == {}
    counts = {"stage 1": {"prompt_tokens": 100, "speech_positions": 60, "answer_tokens": 20}}
    files.write_json(tmp_path / "evaluation.json", {"llm_tokens": counts})
    files.write_json(tmp_path / "timing.json", {"stage 1": {"map_s": 12.0, "decode_s": 48.0}})
    assert compute.of_evaluation(tmp_path) == {"stage 1": compute.Compute(120, 0.0, 1.0)}
