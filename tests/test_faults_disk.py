"""Checkpoints that cannot be written, and checkpoints that are not what was written."""

import errno
import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import CheckpointException

from gengram_megatron.engine.checkpoint.restore import CannotLoad, on_all_ranks
from gengram_megatron.errors import UserError
from gengram_megatron.runs.store import CHECKSUMS, UnreadableCheckpoint, write_checksums
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
    assert "training continues, and the next checkpoint will be tried" in ended[0].out
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
        "step_00000008 (common.pt is missing); resuming from step_00000004" in ended[0].out
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


@pytest.fixture
def unloadable(lab: Lab) -> Path:
    """The unbroken run, of whose checkpoints the last three have the checksums of what is there,
    and cannot be loaded: a rank's tensors are no tensors, those of another were written on another
    node, and the state of the schedule is not there, which is loaded after the weights."""
    shutil.rmtree(lab.run("unloadable"), ignore_errors=True)
    shutil.copytree(lab.run("whole"), lab.run("unloadable"))
    folder = lab.run("unloadable") / "checkpoints"
    zeros, gone, half = (folder / f"step_{step:08d}" for step in (16, 12, 8))
    tensors = zeros / "__1_0.distcp"
    tensors.write_bytes(bytes(tensors.stat().st_size))
    for path in gone.glob("__1_*.distcp"):
        path.unlink()
    common = torch.load(half / "common.pt", weights_only=False)
    del common["schedule"]
    torch.save(common, half / "common.pt")
    for checkpoint in (zeros, gone, half):
        (checkpoint / CHECKSUMS).unlink()
        write_checksums(checkpoint, {})
    return folder


def test_checkpoints_that_cannot_be_loaded_are_passed_over_and_told(
    lab: Lab, unloadable: Path
) -> None:
    ended = lab.start("unloadable").wait()
    assert [said.code for said in ended] == [0, 0], ended[0].err
    (warning,) = [line for line in ended[0].out.splitlines() if "set aside" in line]
    for cause in (
        "step_00000016 (cannot be loaded: ",
        "step_00000012 (__1_0.distcp is missing",
        "step_00000008 (cannot be loaded: KeyError: 'schedule'",
        "resuming from step_00000004",
    ):
        assert cause in warning
    assert lab.checkpoints("unloadable") == [4, 8, 12, 16]
    aside = sorted(path.name[:13] for path in unloadable.glob("*.damaged"))
    assert aside == ["step_00000008", "step_00000012", "step_00000016"]
    # Nothing is left of what the attempts had loaded.
    assert numbers(lab.run("unloadable")) == numbers(lab.run("whole"))


def test_without_one_that_can_be_loaded_nothing_starts_anew(lab: Lab, unloadable: Path) -> None:
    shutil.rmtree(unloadable / "step_00000004")
    ended = lab.start("unloadable", attempt="none").wait()
    assert [said.code for said in ended] == [2, 2]
    assert "step_00000008 (cannot be loaded: KeyError: 'schedule'" in ended[0].err
    assert len(ended[0].err.splitlines()) == 1
    assert lab.checkpoints("unloadable") == [8, 12, 16]  # nothing was changed


def test_file_of_another_node_is_missed_when_a_checkpoint_is_finished(lab: Lab) -> None:
    """A rank's files lie in a folder that the first rank does not see."""
    ended = lab.start("elsewhere", "train.stop_at=9", before=broken.write_elsewhere).wait()
    assert [said.code for said in ended] == [2, 2], ended[0].err
    assert "warning: no checkpoint was written: step 4: " in ended[0].out
    assert "__1_0.distcp is missing" in ended[0].err and "run.dir" in ended[0].err
    assert lab.checkpoints("elsewhere") == []


@pytest.mark.parametrize(
    ("error", "becomes"),
    [
        (UserError("run.seed"), UserError),
        (UnreadableCheckpoint("no checkpoint"), CannotLoad),
        (OSError(errno.EIO, "Input/output error"), CannotLoad),
        (KeyError("schedule"), CannotLoad),
        (CheckpointException("read", {1: (ValueError("no tensor"), None)}), CannotLoad),
        (CheckpointException("read", {}), CannotLoad),
        # These say nothing of the checkpoint, which must not be set aside for them.
        (MemoryError(), MemoryError),
        (torch.OutOfMemoryError("CUDA out of memory"), torch.OutOfMemoryError),
        (OSError(errno.EMFILE, "Too many open files"), OSError),
        (CheckpointException("read", {1: (MemoryError(), None)}), CheckpointException),
        (CheckpointException("read", {1: (KeyboardInterrupt(), None)}), CheckpointException),
    ],
    ids=repr,
)
def test_what_an_error_says_of_a_checkpoint(one_process, error, becomes) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(becomes) as raised:
        on_all_ranks(fail)
    assert type(raised.value) is becomes


def test_rank_that_could_not_load_is_named(one_process) -> None:
    def fail() -> None:
        raise CheckpointException("read", {3: (ValueError("no tensor. Some advice"), None)})

    with pytest.raises(CannotLoad, match="ValueError: no tensor, on rank 3"):
        on_all_ranks(fail)


def test_cpu_allocator_is_no_fault_of_a_checkpoint(one_process) -> None:
    with pytest.raises(RuntimeError, match="allocate"):
        on_all_ranks(lambda: torch.empty(2**60))
