"""Versions, builds and devices: each check on a good state and on a bad one."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from cluster.doctor.findings import FAIL, OK, SKIP, WARN
from cluster.doctor.software import (
    LOCK,
    installed,
    packages,
    python,
    remedy_of,
    schedulers,
    torch_build,
    unsuited,
)


def test_python() -> None:
    assert python().mark == OK
    old = python("3.10.4")
    assert (old.mark, "needs >=3.11" in old.text) == (FAIL, True)


def test_packages_as_in_the_lock() -> None:
    assert LOCK.is_file()
    assert packages(LOCK.with_name("none.lock")).mark == OK
    assert installed("no-such-package") is None


def test_packages_that_differ_are_named(tmp_path: Path) -> None:
    lock = tmp_path / "requirements.lock"
    lock.write_text(f"# a lock\nnumpy==1.0.0\npyarrow=={version('pyarrow')}\nno-such-package==1\n")
    found = packages(lock, ["numpy>=2"])
    assert found.mark == WARN
    assert found.text.startswith(f"1 of 3 are not as in requirements.lock: numpy {version('numpy')} (lock: 1.0.0)")
    lock.write_text(f"pyarrow=={version('pyarrow')}\nno-such-package==1\n")
    found = packages(lock, [])
    assert (found.mark, "1 are not installed (no-such-package)" in found.text) == (OK, True)


def test_packages_out_of_bounds_and_absent_ones_fail(tmp_path: Path) -> None:
    found = packages(tmp_path / "none", ["numpy<1", "no-such-package", "pytest>=99; extra == 'dev'", "torch"])
    assert found.mark == FAIL
    assert found.text == f"numpy {version('numpy')} (needs <1), no-such-package is absent (needs )"
    assert "make install" in found.remedy


WHEEL = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]
CU126 = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]


@pytest.mark.parametrize(
    ("capability", "arch_list", "runs"),
    [((7, 0), WHEEL, False), ((7, 0), CU126, True), ((8, 0), WHEEL, True), ((8, 9), WHEEL, True), ((9, 0), WHEEL, True),
     ((10, 3), WHEEL, True), ((12, 1), WHEEL, True), ((13, 0), WHEEL, True), ((10, 0), CU126, False),
     ((8, 0), [], False), ((7, 2), CU126, True), ((9, 0), ["sm_90a"], True)],
)  # fmt: skip
def test_a_wheel_has_a_device_s_architecture(capability: tuple[int, int], arch_list: list[str], runs: bool) -> None:
    why = unsuited(capability, arch_list)
    assert (why == "") == runs
    if not runs:
        assert f"sm_{capability[0]}{capability[1]}" in why


def test_a_v100_is_sent_to_another_index() -> None:
    assert "make install TORCH_INDEX=" in remedy_of((7, 0))
    assert "cu126" in remedy_of((7, 0))
    assert "cu126" not in remedy_of((10, 0))


def test_torch_beside_a_driver() -> None:
    has_blind_torch = Path("/proc/driver/nvidia/version").exists() and not torch.cuda.is_available()
    found = torch_build()
    assert (found.mark, found.text.startswith(torch.__version__)) == (FAIL if has_blind_torch else OK, True)


def test_schedulers() -> None:
    ray, slurm = schedulers(["no-such-sinfo"])
    assert (ray.mark, slurm.mark) == (OK, SKIP)
    assert list(schedulers(["echo", "slurm 22.05.8"]))[1].text == "slurm 22.05.8"
    broken = list(schedulers(["cat", "/no/such/slurm.conf"]))[1]
    assert (broken.mark, "No such file" in broken.text) == (WARN, True)
    hanging = list(schedulers(["sleep", "20"], limit_s=0.1))[1]
    assert (hanging.mark, hanging.text) == (WARN, "sleep gives no answer within 0.1 s")
