"""Runs that are killed at random points and go on, against a run that nobody disturbs.

A point is drawn from its number alone: the ranks of each attempt, which of them die, and when. Ranks are forks of the
test's process, or torchrun's where the launcher is what dies.
"""

from __future__ import annotations

import importlib
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from sm_train import pretrain, tune
from sm_train.errors import LOST
from sm_train.train import loop
from sm_train.train.engines.watch import Watch
from sm_train.train.saver import Saver
from tests import training
from tests.builders import ROOT, child_env

STEPS = 10
LOOP = {"steps": STEPS, "log_every": 5, "save_every": 3, "validate_every": 5}
STAGES = {"local": pretrain, "zero-1": pretrain, "zero-3": tune}
WORDS = {
    "local": (),
    "zero-1": ("engine.name=deepspeed", "engine.zero_stage=1"),
    "zero-3": ("placement=zero3",),
}
LANES = 4
PATIENCE = ("engine.heartbeat_s=2", "engine.timeout_s=20")
BOUND_S = 40
"""Seconds after which ranks that are still at work count as left behind."""
_CALLS_OF_A_SAVE = 22  # less than the shortest makes


@dataclass(frozen=True)
class Kill:
    """One kill."""

    ranks: int
    """W of the attempt that is killed."""
    who: str
    """rank 0 | another | all | launcher"""
    when: str
    """step (before one of an engine's calls) | save (before one of its file-system calls) | time"""
    where: float
    """Which of the steps that are left, or of the seconds, as a share of them."""
    call: float
    """Which of the step's or the save's calls, as a share of them."""
    by: int
    """The rank that kills at an engine's call."""


@dataclass(frozen=True)
class Point:
    """A run that is killed up to three times."""

    number: int
    engine: str
    kills: tuple[Kill, ...]
    last_ranks: int
    """W of the attempt that reaches the end."""

    @property
    def worlds(self) -> list[int]:
        """W by attempt."""
        return [*(kill.ranks for kill in self.kills), self.last_ranks]


@dataclass
class Outcome:
    """What became of a point."""

    point: Point
    path: Path
    """The run's config, beside its folder."""
    killed: list[bool] = field(default_factory=list)
    """For each kill whether it came before the run's end."""
    lost_steps: list[int] = field(default_factory=list)
    """For each kill, steps with a line that had to be taken again."""
    survivors: int = 0
    is_equal: bool = False
    """Every attempt had the same ranks, and the run is the undisturbed one bit for bit; otherwise it is close."""


def point(number: int, engine: str, launcher: bool = False) -> Point:
    """The point with a number."""
    draw = random.Random(f"{number} {engine}")
    first = (1, 2, 4)[number % 3] if not launcher else 2
    is_elastic = draw.random() < 0.4
    count = 1 if launcher else draw.choices((1, 2, 3), (5, 3, 2))[0]
    worlds = [first, *(draw.choice((1, 2, 4)) if is_elastic else first for _ in range(count))]
    kills = []
    for world in worlds[:-1]:
        who = "launcher" if launcher else draw.choice(("rank 0", "another", "all") if world > 1 else ("rank 0",))
        when = "time" if launcher else draw.choices(("step", "save", "time"), (5, 5, 3))[0]
        kills.append(Kill(world, who, when, draw.random(), draw.random(), draw.randrange(world)))
    return Point(number, engine, tuple(kills), worlds[-1])


class Reference:
    """Undisturbed runs, one for each engine and W that is asked for."""

    def __init__(self, make_config: Callable[[str, str], Path]) -> None:
        self.make_config = make_config
        self._runs: dict[tuple[str, int], tuple[Path, float]] = {}

    def run(self, engine: str, world_size: int) -> tuple[Path, float]:
        """The config of the run, and its seconds from its attempt's begin to its end."""
        if (engine, world_size) not in self._runs:
            path = self.make_config(engine, f"{engine}-{world_size}-undisturbed")
            codes, begun_s = attempt(path, engine, world_size, None)
            assert codes == [0] * world_size, said(path)
            self._runs[engine, world_size] = (path, time.monotonic() - begun_s)
        return self._runs[engine, world_size]


def prepare(engines: Sequence[str]) -> None:
    """Import once, before the forks, what each rank would import."""
    importlib.import_module("torch.utils.tensorboard")
    importlib.import_module("torch._dynamo")  # by the first optimizer otherwise: a second
    if set(engines) - {"local"}:
        os.environ["DS_ACCELERATOR"] = "cpu"
        importlib.import_module("deepspeed")
    if "zero-3" in engines:
        assert importlib.import_module("transformers").AutoModelForCausalLM


def carry_out(point: Point, reference: Reference) -> Outcome:
    """Kill and resume as the point says, to the end; raises AssertionError where a rank is not as it should be."""
    path = reference.make_config(point.engine, f"{point.engine}-{point.number}")
    run, outcome = path.with_suffix(""), Outcome(point, path)
    for kill in point.kills:
        _, undisturbed_s = reference.run(point.engine, kill.ranks) if kill.when == "time" else (path, 0.0)
        if kill.who == "launcher":
            outcome.killed.append(kill_launcher(path, point.engine, kill, undisturbed_s))
        else:
            codes, _ = attempt(path, point.engine, kill.ranks, kill, undisturbed_s)
            outcome.killed.append(-signal.SIGKILL in codes)
            require_codes(kill, codes, path)
            outcome.survivors += codes.count(LOST)
        latest = run / "checkpoints/latest"
        saved = int(os.readlink(latest).removeprefix("step-")) if latest.is_symlink() else 0
        outcome.lost_steps.append(last_line(run) - saved if outcome.killed[-1] else 0)
    codes, _ = attempt(path, point.engine, point.last_ranks, None)
    assert codes == [0] * point.last_ranks, f"the run does not go on: {codes}\n{said(path)}"
    return outcome


def require_codes(kill: Kill, codes: list[int], path: Path) -> None:
    """The victims were killed; every other rank has left with the code that says so."""
    if codes == [0] * kill.ranks:  # the run was over before
        return
    victims = victims_of(kill)
    for rank, code in enumerate(codes):
        expected = {-signal.SIGKILL} if rank in victims else {LOST}
        if kill.when == "time":  # it may come as ranks leave
            expected.add(0)
        assert code in expected, f"rank {rank} left with {code}, of {codes}\n{said(path)}"


def victims_of(kill: Kill) -> list[int]:
    """The ranks that die."""
    another = 1 + int(kill.call * 1000) % max(kill.ranks - 1, 1)
    return {"rank 0": [0], "another": [another], "all": list(range(kill.ranks))}[kill.who]


def attempt(
    path: Path, engine: str, world_size: int, kill: Kill | None, undisturbed_s: float = 0.0
) -> tuple[list[int], float]:
    """One start of the run in forked ranks; exit codes, and when its attempt began on the monotonic clock.

    Raises:
        AssertionError: a rank was still at work after the bound.
    """
    run = path.with_suffix("")
    number = len(list((run / "attempts").glob("*.json"))) + 1
    context = multiprocessing.get_context("fork")
    pids = context.RawArray("i", world_size)
    ready = context.Barrier(world_size)
    victims = victims_of(kill) if kill else []

    def strike() -> None:
        for pid in sorted((pids[rank] for rank in victims), key=lambda pid: pid == os.getpid()):
            os.kill(pid, signal.SIGKILL)

    def work() -> None:
        rank = int(os.environ["RANK"])
        with path.with_suffix(f".said-{number}-{rank}").open("w") as out:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
        pids[rank] = os.getpid()
        ready.wait()
        record_items(path.with_suffix(f".items-{number}-{rank}"))
        if kill and kill.when == "step" and rank == kill.by:
            strike_in_step(kill, strike)
        if kill and kill.when == "save" and rank == 0:
            strike_in_save(kill, strike)
        training.train(path, *WORDS[engine], *PATIENCE, stage=STAGES[engine])

    port = str(training.free_port())
    ranks = [context.Process(target=training._rank, args=(work, r, world_size, port)) for r in range(world_size)]
    for process in ranks:
        process.start()
    begun = run / f"attempts/{number}.json"
    ends_s = time.monotonic() + BOUND_S
    while not begun.exists() and any(process.is_alive() for process in ranks) and time.monotonic() < ends_s:
        time.sleep(0.002)
    begun_s = time.monotonic()
    if kill and kill.when == "time":
        time.sleep(kill.where * undisturbed_s)
        for rank in victims:
            ranks[rank].kill()  # nothing where it has ended
    late = join(ranks, ends_s)
    assert not late, f"{late} of {world_size} ranks were still at work after {BOUND_S} s\n{said(path)}"
    return [int(process.exitcode or 0) for process in ranks], begun_s


def join(ranks: list[Any], ends_s: float) -> int:
    """Wait for processes to end; how many had to be ended."""
    for process in ranks:
        process.join(max(ends_s - time.monotonic(), 0.01))
    late = [process for process in ranks if process.is_alive()]
    for process in late:
        process.kill()
        process.join()
    return len(late)


def strike_in_step(kill: Kill, strike: Callable[[], None]) -> None:
    """Before one of this rank's engine calls in one of the steps that are left, or just behind them."""
    take_step, mark = loop._take_step, Watch.mark
    calls: list[int] = []  # that are left before the kill, once its step has come

    def armed(*args: Any) -> Any:
        cfg, run = args[0], args[6]
        if not hasattr(armed, "step"):
            armed.step = run.global_step + int(kill.where * (cfg.steps - run.global_step))  # type: ignore[attr-defined]
        if run.global_step == armed.step and not calls:  # type: ignore[attr-defined]
            calls.append(int(kill.call * (2 * LANES // kill.ranks + 2)))
        return take_step(*args)

    def counted(self: Watch, doing: str) -> None:
        if calls:
            if calls[0] == 0:
                strike()
            calls[0] -= 1
        mark(self, doing)

    loop._take_step, Watch.mark = armed, counted  # type: ignore[method-assign]


def strike_in_save(kill: Kill, strike: Callable[[], None]) -> None:
    """Before one of the file-system calls of a save, in the thread that makes it."""
    save, is_armed = Saver._save, threading.Event()
    state: dict[str, int] = {}

    def armed(self: Saver, what: str, saved: Any, is_best: bool) -> None:
        state.setdefault("step", int(kill.where * (STEPS + 1 - saved.global_step)) + saved.global_step)
        if saved.global_step >= state["step"]:
            state.setdefault("left", int(kill.call * _CALLS_OF_A_SAVE))
            is_armed.set()
        save(self, what, saved, is_best)

    def count(name: str) -> None:
        if is_armed.is_set() and threading.current_thread().name.startswith("save"):
            if state["left"] == 0:
                strike()
            state["left"] -= 1

    training.watch_calls(pytest.MonkeyPatch(), count)
    Saver._save = armed  # type: ignore[method-assign]


def record_items(out: Path) -> None:
    """Write down the items that this rank takes, by step and lane."""
    real = loop._take_step

    def recorded(*args: Any) -> Any:
        step, run = args[5], args[6]
        lanes = {lane: items_of(batch) for lane, batch in step.batches}
        with out.open("a") as file:
            file.write(json.dumps({"step": run.global_step + 1, "lanes": lanes}) + "\n")
        return real(*args)

    loop._take_step = recorded


def items_of(batch: Any) -> list[list[int]]:
    """What a micro-batch holds: utterances by ordinal and, in stage 2, the sum of their prompts' ids."""
    if hasattr(batch, "speech"):
        return [batch.speech.ordinals.tolist(), (batch.ids_BL * batch.is_real_BL).sum(dim=1).tolist()]
    return [batch.ordinals.tolist()]


def kill_launcher(path: Path, engine: str, kill: Kill, undisturbed_s: float) -> bool:
    """Start the run's command under torchrun and kill torchrun itself; its ranks must end.

    Returns:
        Whether the kill came before the run's end.
    """
    command = training.torchrun(kill.ranks, STAGES[engine].__name__, path, *WORDS[engine], *PATIENCE)
    log = path.with_suffix(".said-1-0").open("w")
    launcher = subprocess.Popen(command, cwd=ROOT, env=child_env(), stdout=log, stderr=log)
    ranks: list[int] = []
    try:
        training.wait_for(lambda: (path.with_suffix("") / "attempts/1.json").exists(), BOUND_S)
        ranks = [int(pid) for pid in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()]
        assert len(ranks) == kill.ranks
        time.sleep(kill.where * undisturbed_s)
    finally:
        launcher.kill()
        launcher.wait()
    training.wait_for(lambda: not any(is_alive(pid) for pid in ranks), timeout_s=10)
    return launcher.returncode == -signal.SIGKILL


def is_alive(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def said(path: Path) -> str:
    """What all ranks of all attempts printed."""
    found = sorted(path.parent.glob(f"{path.stem}.said-*"))
    return "\n".join(f"--- {file.name}\n{file.read_text()[-3000:]}" for file in found)


def last_line(run: Path) -> int:
    """The last step that has a whole line in metrics.jsonl."""
    file = run / "metrics.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return int(json.loads(lines[-1])["step"]) if lines else 0


# ---- judged by what it leaves


def judge(outcome: Outcome, reference: Reference) -> Outcome:
    """Compare a run that was killed with the one that was not; AssertionError where they differ."""
    point = outcome.point
    whole, _ = reference.run(point.engine, point.last_ranks)
    require_same_items(outcome.path, whole)
    run, undisturbed = outcome.path.with_suffix(""), whole.with_suffix("")
    lines, expected = training.metrics(run), training.metrics(undisturbed)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["attempt"] for line in lines] == sorted(line["attempt"] for line in lines)
    folder = run / "checkpoints"
    assert os.readlink(folder / "latest") == f"step-{STEPS}"
    names = {p.name for p in folder.iterdir()}
    assert {name for name in names if not name.startswith("step-")} == {"latest", "best"}
    same = ["epoch", "padding", "lr", "skipped", "items"]
    is_same_ranks = set(point.worlds) == {point.last_ranks}
    if is_same_ranks:
        same += [n for n in expected[-1] if n.startswith(("loss", "valid"))] + ["grad_norm", "accuracy"]
        assert names == {p.name for p in (undisturbed / "checkpoints").iterdir()}
        assert os.readlink(folder / "best") == os.readlink(undisturbed / "checkpoints/best")
        training.assert_equal(*(training.tensors_of(r / "checkpoints/latest") for r in (run, undisturbed)))
        states = [json.loads((r / "checkpoints/latest/state.json").read_text()) for r in (run, undisturbed)]
        assert states[0] == states[1]
    for line, other in zip(lines, expected, strict=True):
        assert {n: line.get(n) for n in same} == {n: other.get(n) for n in same}
        for name in (n for n in other if n.startswith("loss") or n == "grad_norm"):
            assert line[name] == pytest.approx(other[name], rel=1e-5), f"{name} of step {line['step']}"
    shutil.rmtree(run)
    return replace(outcome, is_equal=is_same_ranks)


def require_same_items(path: Path, whole: Path) -> None:
    """Whatever any attempt took in a step is what the undisturbed run took, and all lanes were taken in the end."""

    def taken(of: Path) -> dict[int, dict[int, dict[str, list[int]]]]:
        """Items by attempt, step and lane."""
        found: dict[int, dict[int, dict[str, list[int]]]] = {}
        for file in of.parent.glob(f"{of.stem}.items-*"):
            attempt = int(file.name.split("-")[-2])
            for line in map(json.loads, file.read_text().splitlines()):
                found.setdefault(attempt, {}).setdefault(line["step"], {}).update(line["lanes"])
        return found

    (expected,) = taken(whole).values()
    assert sorted(expected) == list(range(1, STEPS + 1))
    found = taken(path)
    for attempt, step in itertools.chain.from_iterable(((a, s) for s in found[a]) for a in found):
        for lane, items in found[attempt][step].items():
            assert items == expected[step][lane], f"attempt {attempt}, step {step}, lane {lane}"
    for line in training.metrics(path.with_suffix("")):
        if line["attempt"] in found:  # a launcher's ranks record nothing
            assert found[line["attempt"]][line["step"]] == expected[line["step"]]
