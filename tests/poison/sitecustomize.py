"""For processes of tests alone: on PYTHONPATH, it lets audio files end the process that reads or encodes them.

A file named *segfault* ends the one that opens it, one named *killer* the one that has it in the encoder.
TEST_SLOW_S are seconds that each batch takes longer. With TEST_PAUSE=STEP:FILE a rank waits in that step of training
until a signal has come; then it makes the file, and no rank waits once that is there.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import signal
import sys
import time
from types import ModuleType
from typing import Any


def _spoil_soundfile(module: ModuleType) -> None:
    real = module.SoundFile.__init__

    def init(self: Any, file: Any, *args: Any, **kwargs: Any) -> None:
        if "segfault" in str(getattr(file, "name", file)):
            os.kill(os.getpid(), signal.SIGSEGV)
        real(self, file, *args, **kwargs)

    module.SoundFile.__init__ = init


def _spoil_units(module: ModuleType) -> None:
    real = module.UnitEncoder._encode

    def encode(self: Any, job: Any, batch: Any, places: Any) -> Any:
        if any("killer" in job.unit.utterances[i].audio for i in places):
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(float(os.environ.get("TEST_SLOW_S", "0")))
        return real(self, job, batch, places)

    module.UnitEncoder._encode = encode


def _pause_steps(module: ModuleType) -> None:
    step, _, file = os.environ.get("TEST_PAUSE", "").partition(":")
    came: list[int] = []
    real_came, real_rate = module.StopRequest._came, module.learning_rate

    def remember(self: Any, number: int, frame: Any) -> None:
        came.append(number)
        real_came(self, number, frame)

    def rate(cfg: Any, done: int, steps: int) -> float:
        end = time.monotonic() + 100
        while step == str(done + 1) and not came and not os.path.exists(file) and time.monotonic() < end:
            time.sleep(0.02)
        if came:
            open(file, "a").close()
        return float(real_rate(cfg, done, steps))

    module.StopRequest._came, module.learning_rate = remember, rate


_SPOILT = {
    "soundfile": _spoil_soundfile,
    "sm_train.encoding.units": _spoil_units,
    "sm_train.train.loop": _pause_steps,
}


class _Finder(importlib.abc.MetaPathFinder):
    """Finds these modules as everybody does, and changes them once they are loaded."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name not in _SPOILT:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec and spec.loader:
            run = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                _SPOILT[name](module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, _Finder())
