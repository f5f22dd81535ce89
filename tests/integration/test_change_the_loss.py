"""The example in docs/change_the_loss.md, taken out of the page and run as it says."""

from __future__ import annotations

import importlib.util
import re
import signal
import sys
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
from safetensors.torch import load_file

from sm_train import pretrain
from sm_train.errors import UserError
from tests import training
from tests.builders import ROOT
from tools.compare_runs import compare

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def shard_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return training.shard_set(tmp_path_factory.mktemp("loss") / "shards")


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page's one block of Python, as a file."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/change_the_loss.md").read_text(), re.DOTALL)
    path = tmp_path_factory.mktemp("script") / "my_loss.py"
    path.write_text(code)
    return path


@pytest.fixture
def my_loss(script: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The file as a module, whose loss this process's runs train with."""
    spec = importlib.util.spec_from_file_location("my_loss", script)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(pretrain, "run", partial(pretrain.run, make_objective=module.Huber))
    return module


def test_a_step_s_gradient_is_the_same_on_one_and_two_ranks(
    my_loss: ModuleType, shard_folder: Path, tmp_path: Path
) -> None:
    path = training.write_config(tmp_path / "run.yaml", shard_folder)
    found = []
    for world_size in (1, 2):
        out = tmp_path / f"{world_size}.safetensors"
        work = partial(training.first_gradients, path, out)
        assert training.in_ranks(world_size, work) == [0] * world_size
        found.append(load_file(out))
    assert {"loss", "loss_huber", "kept"} <= set(found[0])
    assert sum(float(t.square().sum()) for t in found[0].values()) > 1e-3
    assert training.relative_difference(found[1], found[0]) < 1e-6


def test_a_killed_run_goes_on_bit_equal(my_loss: ModuleType, shard_folder: Path, tmp_path: Path) -> None:
    whole, killed = (training.write_config(tmp_path / f"{name}.yaml", shard_folder) for name in ("whole", "killed"))

    def work() -> None:
        training.kill_at_step(8)
        training.train(killed)

    assert training.in_ranks(1, lambda: training.train(whole)) == [0]
    assert training.in_ranks(1, work) == [-signal.SIGKILL]
    assert training.in_ranks(1, lambda: training.train(killed)) == [0]
    found = compare(killed.with_suffix(""), whole.with_suffix(""), tolerance=0.0)
    assert found.equal, f"\n{found}"
    assert {"loss_huber", "kept", "weights"} <= {quantity.name for quantity in found.quantities}


def test_the_page_s_command_trains_and_refuses_a_run_with_another_loss(
    script: Path, shard_folder: Path, tmp_path: Path
) -> None:
    path = training.write_config(tmp_path / "run.yaml", shard_folder)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = training.run_command([*launcher, str(script), str(path)])
    lines = training.metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(1, 11)), done.stderr
    assert lines[-1]["loss_huber"] < lines[0]["loss_huber"]
    assert all(0 <= line["kept"] <= 1 for line in lines)

    changed = script.with_name("changed.py")
    changed.write_text(script.read_text().replace("DELTA = 0.5", "DELTA = 1.0"))
    refused = training.run_command([sys.executable, str(changed), str(path), "loop.steps=12"])
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: ")
    assert "settings is {'delta': 0.5} there, but {'delta': 1.0} is asked for" in refused.stderr
    with pytest.raises(UserError, match=r"objective is '__main__\.Huber' there, but None is asked for"):
        training.train(path, "loop.steps=12")
    assert len(training.metrics(tmp_path / "run")) == 10
