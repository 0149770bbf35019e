"""Files that are replaced whole or not at all, and locks that processes hold one at a time."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gengram_megatron.files import lock, replacing
from tests.layouts.launch import ROOT

TRY = """
import sys
from pathlib import Path
from gengram_megatron.files import Locked, lock
try:
    with lock(Path(sys.argv[1])):
        print("held")
except Locked as holder:
    print(holder)
"""


def test_a_file_is_replaced_when_all_of_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "numbers.csv"
    for text in ("1,2", "3"):
        before = path.read_text() if path.exists() else None
        with replacing(path) as beside:
            beside.write_text(text)
            assert beside.suffix == ".csv"
            assert (path.read_text() if path.exists() else None) == before
        assert path.read_text() == text
    assert [*tmp_path.iterdir()] == [path]


def test_an_error_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "numbers.csv"
    path.write_text("1,2")
    with pytest.raises(OSError, match="full"), replacing(path) as beside:
        beside.write_text("3")
        raise OSError("the disk is full")
    assert path.read_text() == "1,2"
    assert [*tmp_path.iterdir()] == [path]


def try_to_lock(path: Path) -> str:
    """What another process says that wants a lock."""
    done = subprocess.run(
        [sys.executable, "-c", TRY, str(path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_a_lock_names_its_holder_and_ends_with_it(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with lock(path) as file:
        assert try_to_lock(path) == f"process {os.getpid()} on {os.uname().nodename}"
        # Such as a writer of checkpoints, which may live on when its run was killed.
        child = subprocess.Popen(["sleep", "600"], pass_fds=[file.fileno()])
    try:
        assert try_to_lock(path) == "held"
    finally:
        child.kill()
        child.wait()
