"""Ranks on two nodes: they must share the run's folder and read the same, undamaged data.

A node is a folder that a rank works in, so that the same relative path is another place on each.
"""

import os
import shutil
from functools import partial
from pathlib import Path

import pytest

from tests.training.launch import Ended
from tests.training.ranks import start_ranks
from tests.training.tiny import build_data, write_config, write_few

pytestmark = pytest.mark.timeout(600)


@pytest.fixture
def nodes(tmp_path: Path, tmp_path_factory) -> Path:
    """A folder with a folder for each of two nodes, and the config of a run in `shared`."""
    data = build_data(tmp_path_factory.getbasetemp() / "dna_64")
    for node in ("0", "1"):
        shutil.copytree(data, tmp_path / node / "ds")
    write_config(tmp_path / "tiny.yaml", Path("ds"))
    return tmp_path


def start(nodes: Path, run: str, attempt: str = "first") -> list[Ended]:
    """Train two steps on two nodes."""
    words = ["train", str(nodes / "tiny.yaml"), f"run.dir={run}", "train.steps=2"]
    return start_ranks(2, words, nodes / attempt, partial(_enter_node, nodes)).wait()


def _enter_node(nodes: Path) -> None:
    from gengram_megatron.engine.training import nodes as checks

    checks.VISIBLE_SECONDS = 0.5
    os.environ["LOCAL_RANK"] = "0"
    os.chdir(nodes / os.environ["RANK"])


def flip_a_byte(path: Path) -> None:
    """One base becomes another one; the size stays."""
    content = bytearray(path.read_bytes())
    content[70] = content[70] ^ 1
    path.write_bytes(content)


def told(ended: list[Ended]) -> str:
    """What both ranks said of a mistake, each in the same one line."""
    assert [said.code for said in ended] == [2, 2], ended
    assert len(ended[0].err.splitlines()) == 1 and ended[0].err == ended[1].err
    return ended[0].err


def test_run_folder_that_is_not_shared_is_refused(nodes: Path) -> None:
    said = told(start(nodes, "run"))
    assert "run.dir" in said and f"{nodes}/1/run on {os.uname().nodename}" in said
    assert f"{nodes}/0/run" in said
    # Nothing is trained, and the trial leaves nothing behind.
    assert not [*nodes.glob("*/run/*"), *nodes.glob("*/run/.*")]


def test_what_one_node_lacks_ends_the_others_too(nodes: Path) -> None:
    """Found before the ranks meet, by the one rank; the other would wait for it."""
    with (nodes / "1/ds/train.bin").open("r+b") as file:
        file.truncate(1000)
    waits, fails = start(nodes, str(nodes / "shared"))
    assert [waits.code, fails.code] == [2, 2]
    assert "ds/train.bin has 1,000 bytes" in fails.err
    assert waits.err == f"{fails.err.rstrip()} (found on {os.uname().nodename})\n"
    assert not (nodes / "shared").exists()
    shutil.rmtree(nodes / "1/ds")
    waits, fails = start(nodes, str(nodes / "shared"), "without")
    assert [waits.code, fails.code] == [2, 2]
    assert f"there is no folder {nodes}/1/ds" in waits.err
    shutil.copytree(nodes / "0/ds", nodes / "1/ds")
    (nodes / "shared/.lock").mkdir(parents=True)  # an error of the system on the first rank
    fails, waits = start(nodes, str(nodes / "shared"), "locked")
    assert [waits.code, fails.code] == [2, 2]
    assert f"{nodes}/shared/.lock" in waits.err


def test_other_data_on_another_node_is_refused(nodes: Path, tmp_path_factory) -> None:
    """First damaged there, then built from something else."""
    flip_a_byte(nodes / "1/ds/validation.bin")
    said = told(start(nodes, str(nodes / "shared")))
    assert "ds/validation.bin is damaged" in said and "`gengram-data verify ds`" in said
    assert f"on {os.uname().nodename}" in said
    shutil.rmtree(nodes / "1/ds")
    write_few(nodes / "1/ds")
    said = told(start(nodes, str(nodes / "shared"), "second"))
    assert "data.path: rank 1 on " in said and f"{nodes}/1/ds" in said and f"{nodes}/0/ds" in said
