"""The bench of placements: its formula of time, and its pure parts."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster.fit.gpus import GPUS
from cluster.fit.memory import GIB, LLAMA_31_8B, Mapper
from sm_train import config
from sm_train.errors import UserError
from sm_train.models.mapper import MapperConfig
from tools.bench import BATCHES, PLACEMENTS, Measured, memory_of, ranks_of, started
from tools.bench.placements import BenchConfig, main
from tools.bench.predictions import measured_table, predict, prediction_table, recommend, time_terms

MAPPER = Mapper(MapperConfig(), 4096)
A100_80, V100 = GPUS[2], GPUS[0]


def test_terms_of_time() -> None:
    batch, p = BATCHES[0], LLAMA_31_8B.parameters
    of = {name: time_terms(LLAMA_31_8B, MAPPER, batch, name, 4, A100_80) for name in PLACEMENTS}
    assert of["replicated"]["gathers"] == of["replicated"]["pcie"] == of["zero3"]["pcie"] == 0
    assert of["zero3"]["gathers"] == pytest.approx(4 * (p + MAPPER.parameters) * 0.75 / 240e9)
    assert of["offload"]["pcie"] == pytest.approx(4 * p / 4 / 24e9)
    assert 4 * 0.9 * p * batch.tokens < of["replicated"]["compute"] * 156e12 < 4 * 1.1 * p * batch.tokens
    again = time_terms(LLAMA_31_8B, MAPPER, batch, "zero3", 4, A100_80, recomputed=True)
    assert 1.4 < again["compute"] / of["zero3"]["compute"] < 1.5
    assert time_terms(LLAMA_31_8B, MAPPER, batch, "zero3", 1, A100_80)["gathers"] == 0


def test_gathers_are_as_long_as_the_llm_s_layers_at_t_min() -> None:
    found = predict(A100_80, LLAMA_31_8B, MAPPER, BATCHES[0], "zero3", 4)
    layers_s = 4 * LLAMA_31_8B.layer_parameters * found.min_tokens / 156e12
    assert layers_s == pytest.approx(found.times["gathers"])
    assert found.hidden_s < found.exposed_s


def test_the_fastest_that_fits_is_recommended() -> None:
    def all_of(gpu: object, ranks: int) -> list:  # type: ignore[type-arg]
        return [predict(gpu, LLAMA_31_8B, MAPPER, BATCHES[0], name, ranks) for name in PLACEMENTS]  # type: ignore[arg-type]

    best = recommend(all_of(A100_80, 4))
    assert best is not None
    assert best.placement == "replicated"
    on_v100 = [
        predict(V100, LLAMA_31_8B, MAPPER, BATCHES[1], name, 4, recomputed=name != "replicated") for name in PLACEMENTS
    ]
    assert not on_v100[0].fits
    assert on_v100[0].gib * GIB == sum(on_v100[0].memory.values())
    best = recommend(on_v100)
    assert best is not None
    assert best.placement == "zero3"
    assert recommend([on_v100[0]]) is None


def test_tables_have_a_row_for_each() -> None:
    table = prediction_table(BATCHES[0]).splitlines()
    assert len(table) == 2 + 4 * len(GPUS)
    assert len({line.count("|") for line in table}) == 1
    one = Measured("replicated", 2.0, [700.0, 690.0], [800.0, 790.0], 40.0, [900.0, 900.0], 300.0, 400.0, 1.5)
    other = Measured("zero3", 5.0, [700.0, 690.0], [550.0, 540.0], 40.0, [900.0, 900.0], 300.0, 200.0, 1.5)
    lines = measured_table([one, other]).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert "| 2.00 s, 1.00x |" in lines[2]
    assert "| 500, 1.00x | 400 | 1.25 |" in lines[2]
    assert "| 5.00 s, 2.50x |" in lines[3]
    assert "| 250, 0.50x |" in lines[3]


def test_a_process_is_looked_at_and_ended(tmp_path: Path) -> None:
    code = "import sys; held = b'x' * 2**26; print('ready', flush=True); sys.stdin.read()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with started([sys.executable, "-c", code], tmp_path / "log", **pipes) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        found = memory_of(process.pid)
        assert found is not None
        assert 64 < found["pss"] < 120
        assert found["peak"] > 64
        assert found["file"] < found["pss"] - 60
        assert ranks_of(process.pid) == {}
    assert process.returncode is not None
    assert memory_of(process.pid) is None


def test_ranks_are_the_children_that_have_one(tmp_path: Path) -> None:
    child = f"subprocess.Popen([{sys.executable!r}, '-c', 'import time; time.sleep(60)'], env={{'RANK': str(rank)}})"
    code = (
        f"import subprocess; ranks = [{child} for rank in (0, 1)]; print(*(r.pid for r in ranks), flush=True)\n"
        "try: input()\nfinally: [r.kill() for r in ranks]"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with started([sys.executable, "-c", code], tmp_path / "log", **pipes) as process:
        assert process.stdout is not None
        pids = [int(word) for word in process.stdout.readline().split()]
        until = time.monotonic() + 20
        while (
            len(ranks_of(process.pid)) < 2 and time.monotonic() < until
        ):  # a child has its own environment from exec on
            time.sleep(0.01)
        assert ranks_of(process.pid) == dict(enumerate(pids))
        assert process.stdin is not None
        process.stdin.close()
        process.wait(10)
    assert ranks_of(os.getpid()) == {}


def test_keys(capsys: pytest.CaptureFixture[str]) -> None:
    cfg = config.from_mapping(BenchConfig, {"width": "512", "recomputed": "true", "interval_s": "0.1"}, "test")
    assert (cfg.width, cfg.recomputed, cfg.llm.heads, cfg.llm.kv_heads) == (512, True, 8, 2)
    for wrong in (["width=300"], ["steps=3"], ["show=some"], ["depth=3"], ["width"]):
        with pytest.raises(UserError):
            main(wrong)
    main(["--help"])
    assert "vocabulary" in capsys.readouterr().out
    main(["show=predicted"])
    assert capsys.readouterr().out.count("| A100-40 |") == 8
