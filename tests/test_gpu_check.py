"""scripts/gpu_check.sh rehearsed on the CPU with a Python that lacks megatron-core, as GPU machines
do, and the report of a run."""

import json
import subprocess
import sys
import sysconfig
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest
import torch

from tests.training.tiny import build_data, environment, write_config

ROOT = Path(__file__).parents[1]


def python_without_megatron(folder: Path) -> Path:
    """A Python that has all packages of this one but megatron-core."""
    packages = folder / "packages"
    packages.mkdir()
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not entry.name.startswith("megatron"):
            (packages / entry.name).symlink_to(entry)
    python = folder / "python"
    python.write_text(
        f'#!/bin/sh\nPYTHONPATH="$PYTHONPATH:{packages}" exec {sys.executable} -S "$@"\n'
    )
    python.chmod(0o755)
    return python


def wheel_of_megatron(folder: Path) -> None:
    """megatron-core's wheel, from its installed files."""
    core = distribution("megatron-core")
    with zipfile.ZipFile(folder / f"megatron_core-{core.version}-py3-none-any.whl", "w") as wheel:
        for file in core.files:
            if "__pycache__" not in file.parts and ".." not in file.parts:
                wheel.write(core.locate_file(file), str(file))


def check(python: Path, *words: str, **variables: object) -> subprocess.CompletedProcess:
    """Run the script."""
    return subprocess.run(
        ["bash", "scripts/gpu_check.sh", *words],
        cwd=ROOT,
        env={**environment(), "PYTHON": str(python), **{k: str(v) for k, v in variables.items()}},
        capture_output=True,
        text=True,
        timeout=800,
    )


def test_missing_packages_are_told_in_a_sentence(tmp_path):
    done = check(python_without_megatron(tmp_path), REHEARSE=1)
    assert done.returncode == 2 and done.stdout == ""
    (sentence,) = done.stderr.splitlines()
    assert "missing here: megatron-core; fetch them" in sentence
    assert "pip download -c constraints.txt" in sentence
    assert "--no-deps megatron-core`" in sentence


def test_what_megatron_does_not_need_is_fetched_with_what_it_needs():
    command = [sys.executable, "scripts/missing_packages.py", "no_such_module"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 2
    assert "missing here: no_such_module; " in done.stderr
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    assert f"--python-version {version} " in done.stderr and "--no-deps" not in done.stderr


@pytest.mark.thorough
@pytest.mark.skipif(
    torch.cuda.is_available(), reason="the script goes on to measure where there is a GPU"
)
def test_without_a_gpu_it_measures_nothing():
    done = check(Path(sys.executable))
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("gpu_check: torch sees no GPU here")


@pytest.mark.thorough
@pytest.mark.slow
def test_rehearsal(tmp_path):
    """The whole script, its wheels installed, with a data set that cannot be read: that step is
    recorded, and the rest goes on."""
    wheels, broken, out = tmp_path / "wheels", tmp_path / "data/sample", tmp_path / "out/gpu.json"
    wheels.mkdir()
    wheel_of_megatron(wheels)
    broken.mkdir(parents=True)
    (broken / "manifest.json").write_text("no JSON")
    python = python_without_megatron(tmp_path)
    before = set((ROOT / "benchmarks").rglob("*.json"))

    done = check(python, str(wheels), REHEARSE=1, OUT=out, DATASETS=tmp_path / "data")
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "failed: smoke"
    report = json.loads(out.read_text())
    names = ["data_sets", "gpu_tests", "cpu_tests", "smoke", "gengram_true", "gengram_false"]
    assert list(report["steps"]) == names
    statuses = {name: step["exit_status"] for name, step in report["steps"].items()}
    assert [name for name, status in statuses.items() if status] == ["smoke"]
    assert "manifest.json" in report["steps"]["smoke"]["last_lines"][-1]
    assert "passed" in report["steps"]["cpu_tests"]["result"]
    assert report["smoke"] is None
    for run in report["moe_1.2b_8k"].values():
        assert run["timed_steps"] == 2 and run["tokens_per_second"] > 0
    assert report["time_with_gengram_over_without"] > 0
    assert report["machine"]["megatron_core"] == distribution("megatron-core").version
    assert set((ROOT / "benchmarks").rglob("*.json")) == before


@pytest.mark.thorough
def test_report_of_a_run(tmp_path):
    """A run with one step to time. It leaves no checkpoint, for checkpoint.at_end is false."""
    config = write_config(tmp_path / "config.yaml", build_data(tmp_path / "data"))
    run = tmp_path / "work/runs/gengram_true"
    words = [str(config), f"run.dir={run}", "train.steps=6", "checkpoint.at_end=false"]
    subprocess.run(
        [sys.executable, "-m", "gengram_megatron", "train", *words],
        cwd=ROOT,
        env=environment(),
        check=True,
        timeout=600,
    )
    assert not (run / "checkpoints").exists()
    (tmp_path / "work/runs/smoke").symlink_to(run)
    for name, status in (("smoke", 0), ("gengram_false", 124)):
        (tmp_path / f"work/{name}.log").write_text("one\ntwo\n")
        (tmp_path / f"work/{name}.status").write_text(f"{status} 3\n")

    out = tmp_path / "out.json"
    command = ["benchmarks/gpu_report.py", str(tmp_path / "work"), "--out", str(out)]
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 1 and "failed: gengram_false" in done.stdout
    report = json.loads(out.read_text())
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last, validation = lines[-2:]
    assert report["steps"] == {
        "smoke": {"exit_status": 0, "seconds": 3},
        "gengram_false": {"exit_status": 124, "seconds": 3, "last_lines": ["one", "two"]},
    }
    assert report["smoke"]["validation_nats_a_base"] == validation["loss"]
    assert report["smoke"]["validation_bits_a_base"] == validation["bits_per_base"]
    measured = report["moe_1.2b_8k"]["with_gengram"]
    assert measured["tokens_per_second"] == last["tokens_per_second"]
    assert measured["flops_a_second"] == last["tokens_per_second"] * measured["flops_a_token"]
    assert report["moe_1.2b_8k"]["without_gengram"] is None
    assert "time_with_gengram_over_without" not in report
    if report["machine"]["device"] is None:
        assert measured["model_flops_utilisation"] is None
        assert report["note"].startswith("no utilisation: the peak of a CPU")
