"""Hours, disk, network, GPU-hours and cost of a corpus of any size, by stage.

python -m tools.plan_capacity CONFIG hours=H gpus=N gpu=A100-80 [key=value ...]     # --help lists the keys
python -m tools.plan_capacity CONFIG hours=[960.9,100000,1000000] gpus=64 ...       # a table of sizes
"""

from __future__ import annotations

import json
from pathlib import Path

from sm_train import config, files
from sm_train.errors import run_command
from tools.plan_capacity import plan, render
from tools.plan_capacity.settings import PlanConfig


def main(argv: list[str]) -> None:
    cfg = config.load(PlanConfig, argv, "tools.plan_capacity")
    plans = plan.make(cfg)
    found = render.values(cfg, plans)
    if cfg.out:
        files.write_json(Path(cfg.out), found)
    if cfg.json:
        print(json.dumps(found, indent=1))
    elif len(plans) > 1:
        print(render.sizes(cfg, plans))
    else:
        print(render.text(cfg, plans[0]))


if __name__ == "__main__":
    run_command(main)
