"""scripts/install_slurm.sh, on machines where Slurm is not."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.layouts.launch import ROOT

TOOLS = ("bash", "id", "mktemp", "rm", "tail", "timeout")


def run_with(programs: dict[str, str], folder: Path) -> str:
    """What the script says where there are only its tools and such programs; it must succeed."""
    for name in TOOLS:
        (folder / name).symlink_to(shutil.which(name))
    for name, text in programs.items():
        (folder / name).write_text(f"#!{shutil.which('bash')}\n{text}\n")
        (folder / name).chmod(0o755)
    script = ROOT / "scripts/install_slurm.sh"
    environment = {**os.environ, "PATH": str(folder)}
    done = subprocess.run(
        [folder / "bash", script], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_without_apt_it_says_so(tmp_path: Path) -> None:
    assert "its tests will be skipped" in run_with({}, tmp_path)


@pytest.mark.skipif(os.geteuid() != 0, reason="apt-get is for root")
def test_packages_that_cannot_be_had_are_told(tmp_path: Path) -> None:
    said = run_with({"apt-get": "echo E: no such package >&2; exit 100"}, tmp_path)
    assert "its tests will be skipped: E: no such package" in said


@pytest.mark.skipif(os.geteuid() != 0, reason="apt-get is for root")
def test_missing_packages_are_installed(tmp_path: Path) -> None:
    asked = tmp_path / "asked"
    assert run_with({"apt-get": f'echo "$@" >>{asked}', "sbatch": ""}, tmp_path) == ""
    assert asked.read_text().splitlines() == [
        "update",
        "install -y --no-install-recommends slurmctld slurmd slurm-client munge",
    ]
