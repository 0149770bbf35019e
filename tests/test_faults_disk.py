"""Checkpoints that cannot be written, and checkpoints that are not what was written."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.training import broken
from tests.training.faults import STEPS, Lab
from tests.training.tiny import entries, numbers


def test_writer_that_dies_costs_one_checkpoint(lab: Lab) -> None:
    ended = lab.start("writer", before=partial(broken.kill_writer, step=8)).wait()
    assert [said.code for said in ended] == [0, 0], ended[0].err
    assert "no checkpoint was written: step 8: the process that writes for rank 0" in ended[0].out
    assert lab.checkpoints("writer") == [4, 12, 16]
    assert numbers(lab.run("writer")) == numbers(lab.run("whole"))
    stalls = {e["step"]: e["save_stall"] for e in entries(lab.run("writer")) if "save_stall" in e}
    assert {5, 9, 13} <= stalls.keys() and all(0 < seconds < 30 for seconds in stalls.values())


def test_full_disk_ends_the_run_at_the_second_save_and_leaves_the_last_one(lab: Lab) -> None:
    ended = lab.start("full", "train.stop_at=5").wait()
    assert [said.code for said in ended] == [0, 0], ended[0].err
    full = partial(broken.limit_file_size, 1_000_000)
    ended = lab.start("full", attempt="full", before=full).wait()
    assert [said.code for said in ended] == [2, 2], ended[0].err
    assert "warning: no checkpoint was written: step 8: " in ended[0].out
    assert "training goes on, and the next one is tried" in ended[0].out
    assert "no checkpoint was written: step 12: rank 0 could not write (" in ended[0].err
    assert "bytes are free" in ended[0].err and "Traceback" not in ended[0].err
    assert lab.checkpoints("full") == [4, 5]
    ended = lab.start("full", attempt="space").wait()
    assert [said.code for said in ended] == [0, 0], ended[0].err
    assert numbers(lab.run("full"), "train") == numbers(lab.run("whole"), "train")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk with room for two checkpoints."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(disk)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting a disk needs root")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_space_is_looked_at_before_a_save(lab: Lab, small_disk: Path) -> None:
    ended = lab.start("small", f"run.dir={small_disk}/run").wait()
    assert [said.code for said in ended] == [2, 2], ended[0].err
    needs = "no checkpoint was written: checkpoints of .*: a checkpoint needs 6,[0-9,]+ bytes and"
    assert re.search(f"warning: {needs} [0-9,]+ are free: make room", ended[0].out)
    assert re.search(needs, ended[0].err)  # the last one must be written
    assert len(entries(small_disk / "run", "train")) == STEPS
    found = (small_disk / "run/checkpoints").iterdir()
    assert sorted(path.name for path in found) == ["step_00000004", "step_00000008"]


@pytest.fixture
def damaged(lab: Lab) -> Path:
    """The unbroken run, of whose four checkpoints the last three are damaged, each otherwise."""
    shutil.rmtree(lab.run("damaged"), ignore_errors=True)
    shutil.copytree(lab.run("whole"), lab.run("damaged"))
    folder = lab.run("damaged") / "checkpoints"
    with (folder / "step_00000016/__0_0.distcp").open("r+b") as file:
        file.seek(5000)
        byte = file.read(1)[0]
        file.seek(5000)
        file.write(bytes([byte ^ 4]))
    with (folder / "step_00000012/__0_1.distcp").open("r+b") as file:
        file.truncate(5000)
    (folder / "step_00000008/common.pt").unlink()
    return folder


def test_damaged_checkpoints_are_passed_over_and_told(lab: Lab, damaged: Path) -> None:
    ended = lab.start("damaged").wait()
    assert [said.code for said in ended] == [0, 0], ended[0].err
    assert (
        "warning: damaged, and set aside: "
        "step_00000016 (__0_0.distcp is not what was written), "
        "step_00000012 (__0_1.distcp is not what was written), "
        "step_00000008 (common.pt is missing); going on from step_00000004" in ended[0].out
    )
    assert lab.checkpoints("damaged") == [4, 8, 12, 16]
    assert len([*damaged.glob("*.damaged")]) == 3
    assert numbers(lab.run("damaged")) == numbers(lab.run("whole"))


def test_without_a_whole_checkpoint_nothing_starts_anew(lab: Lab, damaged: Path) -> None:
    (damaged / "step_00000004/checksums.sha256").unlink()
    ended = lab.start("damaged", attempt="none").wait()
    assert [said.code for said in ended] == [2, 2]
    assert f"all checkpoints of {damaged} are damaged: step_00000016 (" in ended[0].err
    assert "step_00000004 (checksums.sha256 is missing)" in ended[0].err
    assert len(ended[0].err.splitlines()) == 1
    assert lab.checkpoints("damaged") == [4, 8, 12, 16]  # nothing was changed
