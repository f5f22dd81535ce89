from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sm_train.errors import UserError
from tests.builders import ROOT, child_env
from tools import compare_runs
from tools.compare_runs import Comparison, compare

Line = dict[str, Any]


def line(step: int, **changes: Any) -> Line:
    values = {
        "attempt": 1, "step": step, "loss": 2.0 / step, "loss_word": 1.0 / step, "grad_norm": 0.5, "lr": 1e-3,
        "epoch": 0, "padding": 0.1, "items": f"{step:016x}", "step_s": 0.25, "peak_memory_mb": 100.0,
        **({"valid_wer": 0.5} if step % 2 == 0 else {}),
    }  # fmt: skip
    return {name: value for name, value in {**values, **changes}.items() if value is not ...}


def run(folder: Path, lines: Sequence[Line], weight: float = 1.5, step: int | None = None, dtype: Any = None) -> Path:
    """A run folder with metrics and a checkpoint."""
    name = f"step-{step or lines[-1]['step']}"
    (folder / "checkpoints" / name).mkdir(parents=True)
    (folder / "checkpoints/latest").symlink_to(name)
    weights = torch.tensor([3.0, weight, -2.0], dtype=dtype)
    save_file({"a": weights, "b": torch.ones(2)}, folder / "checkpoints" / name / "mapper.safetensors")
    moments = {f"{kind}.a": torch.tensor([0.5, 0.25, 0.0]) for kind in ("exp_avg", "exp_avg_sq")}
    save_file(moments, folder / "checkpoints" / name / "moments.safetensors")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(values) + "\n" for values in lines))
    return folder


@pytest.fixture
def against(tmp_path: Path) -> Callable[..., Comparison]:
    """Compares a run with one of four sound steps."""
    sound = run(tmp_path / "sound", [line(step) for step in range(1, 5)])

    def compared(lines: Sequence[Line], tolerance: float = 0.0, **settings: Any) -> Comparison:
        return compare(run(tmp_path / "other", lines, **settings), sound, tolerance)

    return compared


def changed(at: int, **changes: Any) -> list[Line]:
    return [line(step, **(changes if step == at else {})) for step in range(1, 5)]


def test_equal_runs_may_differ_in_speed_memory_and_attempts(against: Callable[..., Comparison]) -> None:
    found = against([line(s, attempt=1 + s // 3, step_s=s / 7, peak_memory_mb=s, checkpoint_s=1) for s in range(1, 5)])
    assert found.equal
    assert found.summary == "equal: 4 steps, 2 tensors"
    compared = {q.name: q.compared for q in found.quantities}
    every_step = ("items", "loss", "loss_word", "grad_norm", "lr", "epoch", "padding")
    assert compared == {**dict.fromkeys(every_step, "4 steps"), "valid_wer": "2 steps", "weights": "2 tensors",
                        "first moments": "1 tensors", "second moments": "1 tensors"}  # fmt: skip


@pytest.mark.parametrize("name", ["items", "loss", "loss_word", "grad_norm", "lr", "epoch", "padding", "valid_wer"])
def test_a_changed_value_is_found_and_named(against: Callable[..., Comparison], name: str) -> None:
    other = "f" * 16 if name == "items" else 0.125
    found = against(changed(2, **{name: other}))
    assert not found.equal
    assert [q.name for q in found.quantities if q.first] == [name]
    assert found.summary == f"different: first at step 2: {name} {other!r} against {line(2)[name]!r}"


@pytest.mark.parametrize("name", ["loss_word", "valid_wer"])
def test_a_value_that_one_run_lacks_is_a_difference(against: Callable[..., Comparison], name: str) -> None:
    found = against([line(step, **{name: ...}) for step in range(1, 5)], tolerance=0.5)
    assert f"{name} nothing against" in found.summary
    assert not found.equal


def test_a_tolerance_is_relative_and_not_for_items(against: Callable[..., Comparison]) -> None:
    nearly = [line(step, loss=2.0 / step * (1 + 1e-6 * step)) for step in range(1, 5)]
    (loss,) = [q for q in against(nearly, tolerance=5e-6).quantities if q.name == "loss"]
    assert (loss.largest, loss.at_step, loss.verdict) == (pytest.approx(4e-6), 4, "within the tolerance")


def test_beyond_a_tolerance_the_first_step_is_named(against: Callable[..., Comparison]) -> None:
    nearly = [line(step, loss=2.0 / step * (1 + 1e-6 * step)) for step in range(1, 5)]
    assert "first at step 3: loss" in against(nearly, tolerance=2.5e-6).summary


@pytest.mark.parametrize("changes", [{"items": "f" * 16}, {"padding": 0.1 + 1e-9}, {"epoch": 1}])
def test_which_items_a_step_took_is_exact_under_any_tolerance(
    against: Callable[..., Comparison], changes: Line
) -> None:
    assert not against(changed(3, **changes), tolerance=0.9).equal


def test_two_values_that_are_not_finite_are_equal_one_is_not(tmp_path: Path) -> None:
    one, other = ([line(1, loss=None), line(2, loss=value)] for value in (None, 1.0))
    found = compare(run(tmp_path / "a", one), run(tmp_path / "b", other), tolerance=0.5)
    assert found.summary == "different: first at step 2: loss nothing against 1.0"


def test_the_cause_is_named_before_what_follows_from_it(against: Callable[..., Comparison]) -> None:
    found = against(changed(2, loss=9.0, items="f" * 16))
    assert "first at step 2: items" in found.summary


def test_item_ids_that_one_run_lacks_are_no_difference_but_said(against: Callable[..., Comparison]) -> None:
    found = against([line(step, **({"items": ...} if step < 3 else {})) for step in range(1, 5)])
    assert found.equal
    assert found.notes == ["item ids are compared at 2 of 4 steps: the others lack them"]


@pytest.mark.parametrize(
    ("steps", "finding"),
    [
        ([1, 2, 4], "step 3 missing in"),
        ([2, 3, 4], "step 1 missing in"),
        ([1, 2, 2, 3, 4], "step 2 more than once in"),
        ([1, 3, 2, 4], "step 2 out of order in"),
        ([1, 2, 3], "step 4 in"),
    ],
)
def test_steps_that_do_not_stand_once_and_in_order_are_a_finding(
    against: Callable[..., Comparison], steps: list[int], finding: str
) -> None:
    found = against([line(step) for step in steps], step=4)
    assert not found.equal
    assert finding in found.findings[0]
    assert found.summary.startswith(f"different: {finding}")
    assert found.summary.endswith("the steps that both have are equal")


def test_a_torn_line_and_an_attempt_that_goes_back_are_findings(tmp_path: Path) -> None:
    torn = run(tmp_path / "torn", [line(1), line(2)])
    with (torn / "metrics.jsonl").open("a") as file:
        file.write('{"attempt": 1, "step": 3, "lo')
    back = run(tmp_path / "back", [line(1, attempt=2), line(2, attempt=1)])
    findings = compare(torn, back, 0.0).findings
    assert findings == [
        f"line 3 of {torn / 'metrics.jsonl'} is no step", f"attempt 1 follows attempt 2 at step 2 of {back}"
    ]  # fmt: skip


def test_weights_are_compared_over_all_tensors(against: Callable[..., Comparison]) -> None:
    found = against(changed(1), weight=1.5 + 2**-10)
    (weights,) = [q for q in found.quantities if q.name == "weights"]
    assert weights.largest == pytest.approx(2**-10 / (9 + 2.25 + 4 + 2) ** 0.5)
    assert found.summary == "different: first at step 4: weights differ by 2.4e-04, relative, in 1 tensors"


def test_weights_may_differ_within_a_tolerance(against: Callable[..., Comparison]) -> None:
    found = against(changed(1), weight=1.5 + 2**-10, tolerance=1e-3)
    assert found.summary == "equal: 4 steps, 2 tensors, relative differences up to 2.4e-04"


@pytest.mark.parametrize("settings", [{"weight": float("nan")}, {"dtype": torch.float64}])
def test_weights_that_are_not_alike_are_different(against: Callable[..., Comparison], settings: Line) -> None:
    assert "first at step 4: weights" in against(changed(1), tolerance=0.5, **settings).summary


def test_checkpoints_of_different_steps_are_not_compared(against: Callable[..., Comparison]) -> None:
    found = against(changed(1), step=3)
    assert found.equal
    assert not [q for q in found.quantities if q.name == "weights"]
    assert "step-3" in found.notes[0]
    assert "step-4" in found.notes[0]


def test_a_person_s_mistakes(tmp_path: Path) -> None:
    sound, later = run(tmp_path / "sound", [line(1)]), run(tmp_path / "later", [line(2)])
    (tmp_path / "empty").mkdir()
    for other, message in ((tmp_path / "no", "does not exist"), (tmp_path / "empty", "no metrics"), (later, "common")):
        with pytest.raises(UserError, match=message):
            compare(sound, other, 0.0)
    for argv in ([], [str(sound)], [str(sound), str(sound), "tolerance=x"], [str(sound), str(sound), "tolerence=1"]):
        with pytest.raises(UserError, match="usage"):
            compare_runs.main(argv)


def test_the_command_s_output_and_exit_codes(tmp_path: Path) -> None:
    one, other = run(tmp_path / "a", changed(1)), run(tmp_path / "b", changed(3, grad_norm=0.25))

    def command(*argv: object) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-m", "tools.compare_runs", *map(str, argv)]
        return subprocess.run(words, cwd=ROOT, env=child_env(), capture_output=True, text=True)

    found = command(one, other)
    assert found.returncode == 1
    assert "grad_norm      | 4 steps   | 1.0e+00            | 3       | different from step 3" in found.stdout
    assert found.stdout.splitlines()[-1] == "different: first at step 3: grad_norm 0.5 against 0.25"
    assert command(one, other, "tolerance=1").returncode == 0
    wrong = command(one, tmp_path / "no")
    assert (wrong.returncode, wrong.stderr) == (2, f"error: run folder {tmp_path / 'no'} does not exist\n")
