"""docs/adding_a_memory.md, followed to the letter in a copy of the program."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.layouts.launch import ROOT
from tests.training.launch import python
from tests.training.tiny import build_data, environment, losses, write_config

GUIDE = ROOT / "docs/adding_a_memory.md"
WITH = ("model.gengram.enabled=false", "model.token_vectors=true", "data.workers=0")


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    """A copy of the packages with the guide's memory in it."""
    folder = tmp_path_factory.mktemp("program")
    for package in ("gengram_megatron", "data_prep"):
        shutil.copytree(ROOT / package, folder / package)
    text = GUIDE.read_text()
    for block in re.findall(r"```diff\n(.*?)```", text, re.DOTALL):
        for name, change in re.findall(r"--- (\S+)\n((?:[ +].*\n)+)", block):
            first, *added = change.splitlines()
            assert first[0] == " " and all(line[0] == "+" for line in added)
            before = (folder / name).read_text()
            assert before.count(first[1:] + "\n") == 1, f"{name} lacks {first}"
            after = "\n".join([first[1:], *(line[1:] for line in added)])
            (folder / name).write_text(before.replace(first[1:] + "\n", after + "\n"))
    ((name, module),) = re.findall(r"a new file `(\S+)`:\n\n```python\n(.*?)```", text, re.DOTALL)
    (folder / name).write_text(module)
    return folder


def touched(program: Path) -> set[str]:
    """The files of the copy that are new or other than here."""
    files = [path.relative_to(program) for path in program.rglob("*.py")]
    return {
        str(path)
        for path in files
        if not (ROOT / path).exists() or (ROOT / path).read_text() != (program / path).read_text()
    }


def test_only_the_model_and_the_schema_are_touched(program) -> None:
    model = "gengram_megatron/engine/model"
    assert touched(program) == {
        "gengram_megatron/config/schema.py",
        f"{model}/build.py",
        f"{model}/token_vectors.py",
    }


def test_a_config_with_two_memories_is_refused(program, tmp_path) -> None:
    both = ("model.gengram.enabled=true", "model.token_vectors=true", f"run.dir={tmp_path}")
    done = subprocess.run(
        [
            *python(1),
            "-m",
            "gengram_megatron",
            "config",
            str(ROOT / "configs/smoke/cpu.yaml"),
            *both,
        ],
        cwd=program,
        env={**environment(), "PYTHONPATH": str(program)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "token_vectors and gengram.enabled" in done.stderr


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    data = build_data(tmp_path_factory.getbasetemp() / "dna_64")
    return write_config(tmp_path_factory.mktemp("memory") / "tiny.yaml", data)


def train(program: Path, config: Path, run: Path, processes: int, *words: str) -> list[float]:
    """The losses of a run."""
    command = [*python(processes), "-m", "gengram_megatron", "train", str(config)]
    done = subprocess.run(
        [*command, f"run.dir={run}", *WITH, *words],
        cwd=program,
        env={**environment(), "PYTHONPATH": str(program)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return losses(run)


@pytest.mark.thorough
def test_it_trains_in_other_layouts_and_goes_on(program, config, tmp_path) -> None:
    alone = train(program, config, tmp_path / "alone", 1, "checkpoint.interval=2")
    words = ("parallel.tensor=2", "train.stop_at=2")
    train(program, config, tmp_path / "split", 2, *words)
    split = train(program, config, tmp_path / "split", 2, "parallel.tensor=2")
    assert len(alone) == 4 and split == pytest.approx(alone, rel=1e-5)
    without = train(program, config, tmp_path / "without", 1, "model.token_vectors=false")
    assert abs(alone[-1] - without[-1]) > 1e-4
