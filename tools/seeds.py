"""Both stages of the miniature with several seeds, and the spread of the figures.

    python -m tools.seeds 0 1 2 [key=value ...]

Each seed has run folders runs/seeds/SEED/{stage1,asr-ce,asr-ce-mse} beside the demo's corpus, shards and tasks (make
demo first); finished ones are kept. Overrides are pretraining's.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sm_train.errors import UserError, run_command
from sm_train.files import write_text
from sm_train.scoring.scores import Result, read_results

FOLDER = Path("runs/seeds")
PRETRAIN, TUNE, EVALUATE = (f"configs/{stage}/miniature.yaml" for stage in ("pretrain", "tune", "evaluate"))
TUNED = {"asr-ce": ["objective.sigma=0"], "asr-ce-mse": []}


def run_seed(seed: int, overrides: Sequence[str]) -> list[Result]:
    """Pretrain, tune and evaluate one seed on two ranks; what is finished is not done again."""
    folder = FOLDER / str(seed)
    stage_1, of_seed = folder / "stage1", f"seed={seed}"
    torchrun = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc-per-node", "2", "-m"]
    commands = [[*torchrun, "sm_train.pretrain", PRETRAIN, f"run={stage_1}", of_seed, *overrides]]
    for name, words in TUNED.items():
        commands.append(
            [*torchrun, "sm_train.tune", TUNE, f"run={folder / name}", f"mapper={stage_1}", of_seed, *words]
        )
    tuned = ",".join(str(folder / name) for name in TUNED)
    commands.append([sys.executable, "-m", "sm_train.evaluate", EVALUATE, f"run={stage_1}", f"tuned=[{tuned}]"])
    for command in commands:
        if code := subprocess.run(command, check=False).returncode:
            raise SystemExit(code)
    return read_results(stage_1 / "results.json")


def table(results: Sequence[Sequence[Result]]) -> str:
    """Mean, least and most over seeds of every figure, as Markdown, with the share of the topline."""
    values: dict[tuple[str, str, str, str], list[float]] = {}
    for of_seed in results:
        for r in of_seed:
            values.setdefault((r.split, r.task, r.metric, r.system), []).append(r.value)
    lines = [
        "| split | task | metric | system | mean | least | most | share of topline |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (split, task, metric, system), found in sorted(values.items()):
        top = values.get((split, task, metric, "topline"))
        is_share = top and system != "topline" and metric in ("chrF", "accuracy")
        share = f"{np.mean(found) / np.mean(top):.3f}" if top and is_share else ""
        digits = 3 if metric in ("accuracy", "exact") else 1
        cells = [f"{x:.{digits}f}" for x in (np.mean(found), min(found), max(found))]
        lines.append("| " + " | ".join([split, task, metric, system, *cells, share]) + " |")
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    seeds = [int(word) for word in argv if word.isdigit()]
    overrides = [word for word in argv if "=" in word]
    if not seeds or len(seeds) + len(overrides) != len(argv):
        raise UserError("usage: python -m tools.seeds SEED [SEED ...] [key=value ...]")
    text = table([run_seed(seed, overrides) for seed in seeds])
    write_text(FOLDER / "table.md", text + "\n")
    print(text)


if __name__ == "__main__":
    run_command(main)
