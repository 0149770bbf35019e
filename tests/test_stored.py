"""What earlier versions have written is read: data sets, checkpoints, the folder of a run."""

import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tests.layouts.launch import ROOT
from tests.training.launch import gengram
from tests.training.tiny import environment, losses


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> Path:
    """The folder in which an earlier version has begun a run."""
    folder = tmp_path_factory.mktemp("stored")
    with tarfile.open(ROOT / "tests/stored/tiny_run.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


def test_a_run_goes_on_as_if_it_had_never_stopped(stored) -> None:
    said = gengram("train", str(stored / "run.yaml"), f"run.dir={stored / 'run'}",
                   f"data.path={stored / 'dna'}")  # fmt: skip
    assert said.code == 0, said.err
    assert "resuming after step 2" in said.out
    lines = map(json.loads, (stored / "whole_run.jsonl").read_text().splitlines())
    whole = [entry["loss"] for entry in lines]
    assert losses(stored / "run") == pytest.approx(whole[2:4], rel=1e-6)
    assert losses(stored / "run", "validation") == pytest.approx(whole[4:], rel=1e-6)


def test_its_checkpoint_is_whole_and_says_what_it_holds(stored) -> None:
    checkpoint = stored / "run/checkpoints/step_00000002"
    assert gengram("checkpoint", "verify", str(checkpoint)).code == 0
    found = json.loads(gengram("checkpoint", "inspect", str(checkpoint), "--json").out)
    assert found["step"] == 2 and found["parameters"]["total"] == 6876


def test_its_data_set_is_what_was_built(stored) -> None:
    words = ["verify", "dna", "--against-sources", "dna.yaml"]
    command = [sys.executable, "-m", "data_prep", *words]
    done = subprocess.run(command, cwd=stored, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
