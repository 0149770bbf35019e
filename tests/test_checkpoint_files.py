"""A run's checkpoints as files: which stay, whether they fit, whether they are what was written."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from typer.testing import CliRunner

from gengram_megatron.commands.checkpoint import DAMAGED
from gengram_megatron.commands.cli import app
from gengram_megatron.config.layout import check_layout
from gengram_megatron.config.schema import Config
from gengram_megatron.errors import UserError
from gengram_megatron.runs.store import (
    CHECKSUMS,
    FORMAT,
    CheckpointStore,
    Facts,
    damage,
    write_checksums,
)
from tests.training.tiny import RUN, environment

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
TENSORS = "__0_0.distcp"


def write(store: CheckpointStore, step: int, **known: str) -> Path:
    """A checkpoint with all files that one has, and one tensor."""
    partial = store.begin(step)
    dcp.save({"weight": torch.arange(10 * step)}, checkpoint_id=partial, no_dist=True)
    torch.save({"step": step}, partial / "common.pt")
    (partial / "metadata.json").write_text("{}")
    facts = Facts(format=FORMAT, step=step, samples=step, seed=1, layout={})
    store.finish(partial, facts, known)
    return store.path(step)


def test_newest_and_every_mth_stay(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2, keep_every=6)
    stay = []
    for step in (2, 4, 6, 8, 10, 12, 14, 16):
        write(store, step)
        stay.append(store.steps())
    assert stay[3] == [6, 8]  # of the newest two anyway
    assert stay[4] == [6, 8, 10]
    assert stay[-1] == [6, 12, 14, 16]


@pytest.mark.parametrize(("interval", "every"), [(4, 6), (None, 4)])
def test_keep_every_that_never_comes_is_refused(interval: int | None, every: int) -> None:
    config = Config.model_validate(
        {
            **RUN,
            "run": {"dir": "unused"},
            "data": {"path": "unused"},
            "checkpoint": {"interval": interval, "keep_every": every},
        }
    )
    with pytest.raises(UserError, match=f"checkpoint.keep_every is {every}, "):
        check_layout(config, 1)
    config.checkpoint.interval = 2
    check_layout(config, 1)


def test_checkpoint_that_does_not_fit_is_not_begun(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints")
    with pytest.raises(UserError, match=r"needs 1,000,000,000,000,000 bytes and [0-9,]+ are free"):
        store.begin(1, estimate=10**15)
    assert not [*(tmp_path / "checkpoints").iterdir()]
    write(store, 1)
    store.begin(2, estimate=10**15)  # the last one is known to be small


def test_two_attempts_at_one_step_do_not_share_a_folder(tmp_path: Path) -> None:
    """The writer of a run that was killed may still write to the first."""
    store = CheckpointStore(tmp_path)
    first, second = store.begin(1), store.begin(1)
    assert first != second and not first.exists() and second.exists()


def test_manifest_is_one_that_sha256sum_reads(tmp_path: Path) -> None:
    checkpoint = write(CheckpointStore(tmp_path), 3)
    done = subprocess.run(
        ["sha256sum", "--check", "--strict", CHECKSUMS],
        cwd=checkpoint,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    files = {path.name for path in checkpoint.iterdir()} - {CHECKSUMS}
    assert {line.split(":")[0] for line in done.stdout.splitlines()} == files


def test_checksum_that_a_writer_computed_is_taken_over(tmp_path: Path) -> None:
    checkpoint = write(CheckpointStore(tmp_path), 3, **{TENSORS: "0" * 64})
    assert damage(checkpoint) == [f"{TENSORS} is not what was written"]


def flip(checkpoint: Path) -> None:
    content = bytearray((checkpoint / TENSORS).read_bytes())
    content[7] ^= 1
    (checkpoint / TENSORS).write_bytes(content)


def truncate(checkpoint: Path) -> None:
    (checkpoint / TENSORS).write_bytes((checkpoint / TENSORS).read_bytes()[:-1])


def unreadable_manifest(checkpoint: Path) -> None:
    """Not even by root."""
    (checkpoint / CHECKSUMS).unlink()
    (checkpoint / CHECKSUMS).mkdir()


def cut_manifest(checkpoint: Path) -> None:
    text = (checkpoint / CHECKSUMS).read_text()
    (checkpoint / CHECKSUMS).write_text("".join(text.splitlines(keepends=True)[:-1]))


def forget(name: str) -> Callable[[Path], None]:
    """A file that was never in the folder, so that its checksum is not expected either."""

    def spoil(checkpoint: Path) -> None:
        for path in (checkpoint / name, checkpoint / CHECKSUMS):
            path.unlink()
        write_checksums(checkpoint, {})

    return spoil


def write_half(checkpoint: Path) -> None:
    truncate(checkpoint)
    write_checksums(checkpoint, {})


WAYS = {
    "flipped": (flip, f"{TENSORS} is not what was written"),
    "truncated": (truncate, f"{TENSORS} is not what was written"),
    "missing": (lambda path: (path / ".metadata").unlink(), ".metadata is missing"),
    "added": (lambda path: (path / "more").touch(), f"{CHECKSUMS} lacks more"),
    "manifest_cut": (cut_manifest, f"{CHECKSUMS} lacks metadata.json"),
    "manifest_gone": (lambda path: (path / CHECKSUMS).unlink(), f"{CHECKSUMS} is missing"),
    **{
        f"without {name}": (forget(name), f"{name} is missing")
        for name in (TENSORS, ".metadata", "common.pt", "metadata.json")
    },
    "written_in_part": (write_half, f"{TENSORS} has "),
    "manifest_empty_line": (
        lambda path: (path / CHECKSUMS).write_text("\n"),
        f"{CHECKSUMS} is not a list of checksums and names",
    ),
    "manifest_unreadable": (unreadable_manifest, f"{CHECKSUMS} cannot be read: "),
    "manifest_binary": (
        lambda path: (path / CHECKSUMS).write_bytes(b"\xff\xfe"),
        f"{CHECKSUMS} is not a list of checksums and names",
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_verify_names_what_is_wrong(tmp_path: Path, way: str) -> None:
    store = CheckpointStore(tmp_path / "checkpoints")
    good, bad = write(store, 1), write(store, 2)
    spoil, expected = WAYS[way]
    spoil(bad)
    for path, line in ((bad, f"{bad}: {expected}"), (good, f"{good}: whole, 5 files")):
        said = CliRunner().invoke(app, ["checkpoint", "verify", str(path)])
        (found,) = said.output.splitlines()
        assert found.startswith(line)
        assert said.exit_code == (DAMAGED if path == bad else 0)
    said = CliRunner().invoke(app, ["checkpoint", "verify", str(tmp_path)])
    whole, damaged = said.output.splitlines()
    assert whole == f"{good}: whole, 5 files" and damaged.startswith(f"{bad}: {expected}")
    assert said.exit_code == DAMAGED


def test_verify_misses_the_description_of_a_checkpoint_in_a_run(tmp_path: Path) -> None:
    bad = write(CheckpointStore(tmp_path / "checkpoints"), 1)
    forget("gengram.json")(bad)
    said = CliRunner().invoke(app, ["checkpoint", "verify", str(tmp_path)])
    assert said.output == f"{bad}: gengram.json is missing\n" and said.exit_code == DAMAGED


@pytest.mark.parametrize("way", ["flipped", "missing", "added", "manifest_gone"])
def test_shares_of_the_files_are_all_of_them(tmp_path: Path, way: str) -> None:
    bad = write(CheckpointStore(tmp_path), 2)
    spoil, expected = WAYS[way]
    spoil(bad)
    found = [damage(bad, share, 4) for share in range(4)]
    assert {problem for own in found for problem in own} == {expected}


def test_verify_of_what_is_no_run_is_told_in_one_sentence(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "gengram_megatron", "checkpoint", "verify", str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr == (
        f"gengram: {tmp_path} is neither a checkpoint nor the folder of a run that has any\n"
    )


def test_helper_that_was_killed_at_once_is_not_forgotten() -> None:
    """In a process of its own, as what is tried lasts as long as its process."""
    program = """
import multiprocessing, os, signal
from gengram_megatron.engine.checkpoint.writer import _track_started_processes
started = _track_started_processes()
context = multiprocessing.get_context("fork")
first = context.Process(target=signal.raise_signal, args=(signal.SIGKILL,))
first.start()
os.waitid(os.P_PID, first.pid, os.WEXITED | os.WNOWAIT)
context.Process(target=int).start()  # which has multiprocessing forget the first
assert first not in multiprocessing.active_children()
assert [process.exitcode for process in started][0] == -signal.SIGKILL
"""
    done = subprocess.run([sys.executable, "-c", program], env=environment(), capture_output=True)
    assert done.returncode == 0, done.stderr
