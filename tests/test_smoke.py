"""scripts/smoke.sh, shortened, from data set to picture."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.thorough
def test_smoke_script_with_few_steps() -> None:
    environment = {**os.environ, "GENGRAM_VENV": sys.prefix}
    words = ["train.steps=8", "checkpoint.interval=4", "train.validation_samples=16"]
    done = subprocess.run(
        ["bash", "scripts/smoke.sh", *words],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the losses of 4 steps after the cut are bit-identical" in done.stdout
    assert "the model with Gengram" in done.stdout
    assert "Markov model of order 5" in done.stdout
    picture = next(line for line in done.stdout.splitlines() if line.startswith("picture: "))
    assert (ROOT / picture.removeprefix("picture: ")).read_bytes().startswith(b"\x89PNG")
