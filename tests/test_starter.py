"""`gengram init`: what it writes is accepted as it is, fits the machine, and overwrites nothing."""

import re
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from data_prep.cli import program
from data_prep.schema import DataConfig
from gengram_megatron.commands.cli import app
from gengram_megatron.commands.init import Machine, data_text, find_machine, run_text
from gengram_megatron.config.layout import check_layout
from gengram_megatron.config.load import load_config
from gengram_megatron.config.schema import Config
from gengram_megatron.errors import UserError
from gengram_megatron.plan import plan
from gengram_megatron.plan.time import Speed
from tests.built_sets import random_fragments, write_set
from tests.layouts.launch import ROOT
from tests.training.tiny import entries, environment

GIB = 1 << 30
MACHINES = {
    "cpu": Machine(0, 8 * GIB, False),
    "old gpu": Machine(1, 6 * GIB, False),
    "gpu of 24": Machine(1, 24 * GIB, True),
    "gpu of 80": Machine(1, 80 * GIB, True),
    "six": Machine(6, 40 * GIB, True),
    "eight": Machine(8, 80 * GIB, True),
}


def run(name: str, words: list[str]) -> str:
    """What a command prints."""
    application = app if name == "gengram" else program(words)
    return CliRunner().invoke(application, words, catch_exceptions=False).output


@pytest.mark.parametrize("length", [64, 512, 8192])
@pytest.mark.parametrize("name", MACHINES)
def test_a_run_fits_its_machine(tmp_path, name, length):
    machine, data = MACHINES[name], tmp_path / "data"
    write_set(data, random_fragments(40, length, 1), random_fragments(2, length, 2))
    path = tmp_path / "run.yaml"
    path.write_text(run_text(path, data, machine))
    config = load_config(path, [], Config)
    assert (config.model.seq_length, config.data.path) == (length, str(data))
    check_layout(config, 1)
    layout = check_layout(config, max(machine.gpus, 1))
    planned = plan(config, layout, Speed(), float("inf"), on_gpu=bool(machine.gpus))
    assert planned["memory_bytes_per_rank"]["total"] < machine.memory
    assert config.train.precision == ("bf16" if machine.bf16 else "fp32")
    text = path.read_text()
    (said,) = re.findall(r"^model: +# ([0-9,]+) parameters$", text, re.MULTILINE)
    assert said == f"{planned['parameters']['total']:,}"
    samples = config.train.steps * config.train.global_batch_size
    assert f"# {samples:,} samples; the data set has 40 to train on" in text


def test_a_larger_machine_gets_a_larger_model(tmp_path):
    data = write_set(tmp_path / "a", random_fragments(9, 512, 1), random_fragments(2, 512, 2))
    sizes = []
    for name in ("cpu", "old gpu", "gpu of 24", "gpu of 80"):
        path = tmp_path / "run.yaml"
        path.write_text(run_text(path, data, MACHINES[name]))
        sizes.append(load_config(path, [], Config).model.hidden_size)
    assert sizes[0] < sizes[1] < sizes[2] != sizes[3] == 1024


def test_the_files_of_a_data_set_are_relative_to_its_config(tmp_path):
    files = [tmp_path / "a/one.fa", tmp_path / "b/one.fa.gz", tmp_path / "b/two x.fna"]
    for path in files:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"A" * 100_000)
    path = tmp_path / "configs/data.yaml"
    path.parent.mkdir()
    path.write_text(data_text(path, files, MACHINES["cpu"]))
    config = load_config(path, [], DataConfig)
    sources = config.groups["all"].sources
    assert list(sources) == ["one", "one_2", "two_x"]
    assert [(path.parent / one.fasta).resolve() for one in sources.values()] == files
    assert config.seq_length == 512
    path.write_text(data_text(path, files[:1], MACHINES["eight"]))
    assert load_config(path, [], DataConfig).seq_length == 64  # of 100,000 bases


def test_from_genomes_to_a_trained_model(tmp_path, monkeypatch):
    """As the help shows it, in the current folder; two steps of training."""
    monkeypatch.chdir(tmp_path)
    genome = ROOT / "sample_data/gorilla_chr22_sample.fa.gz"
    (tmp_path / "genomes").mkdir()
    (tmp_path / "genomes/gorilla.fa.gz").symlink_to(genome)
    assert "gengram-data build my_data.yaml" in run("gengram", ["init", "data"])
    run("gengram-data", ["build", "my_data.yaml"])
    assert "gengram train my_run.yaml" in run("gengram", ["init"])
    quick = ["train.steps=2", "train.validation_samples=4", "checkpoint.at_end=false"]
    command = [sys.executable, "-m", "gengram_megatron", "train", "my_run.yaml", *quick]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(entries(tmp_path / "runs/my_run", "train")) == 2
    for words in (["init"], ["init", "data"], ["init", "--output", "my_data.yaml"]):
        before = {path: path.read_text() for path in tmp_path.glob("*.yaml")}
        with pytest.raises(UserError, match="already exists"):
            run("gengram", words)
        assert before == {path: path.read_text() for path in tmp_path.glob("*.yaml")}


@pytest.mark.parametrize(
    "words, says",
    [
        (["init", "data"], "no FASTA file"),
        (["init", "data", "nowhere.fa"], "nowhere.fa"),
        (["init", "data", "/proc/self/task"], "/proc/self/task"),
        (["init", "run"], "no data set in datasets/"),
        (["init", "run", "nowhere"], "nowhere is not a data set"),
        (["init", "--output", "no/a.yaml"], "there is no folder no"),
    ],
)
def test_what_is_missing_is_said(tmp_path, monkeypatch, words, says):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=says):
        run("gengram", words)
    assert not list(tmp_path.iterdir())


def test_gpus_are_those_that_nvidia_smi_lists(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA H, 80GB, 81920, 9.0'\necho 'T4, 24576, 7.5'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert find_machine() == Machine(2, 24576 << 20, False)
    for visible, found in (
        ("0", Machine(1, 81920 << 20, True)),
        ("1", Machine(1, 24576 << 20, False)),
        ("GPU-5c1c", Machine(1, 81920 << 20, True)),
    ):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert find_machine() == found
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert find_machine().gpus == 0
    tool.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'\nexit 9\n")
    assert find_machine().gpus == 0
