"""`gengram doctor` as a user meets it, and its table of parts against the model of the run
itself."""

import json
import os
import subprocess
import sys
from math import isfinite
from pathlib import Path

import pytest

from gengram_megatron.commands.doctor import examine
from gengram_megatron.commands.doctor.ask import NoAnswer, ask
from gengram_megatron.commands.doctor.command import show
from gengram_megatron.commands.doctor.fit import memory_problems, room_problems, sample
from gengram_megatron.config.layout import Projection, check_layout, with_gengram
from gengram_megatron.config.load import load_config
from gengram_megatron.config.schema import Config
from gengram_megatron.runs.store import estimated_size
from tests.layouts.launch import ROOT
from tests.training.tiny import DENSE, MLA, environment, write_config

PARTS = {
    "attention", "norm", "linear", "experts", "memory", "optimizer", "gradient accumulation fusion",
    "fp8",
}  # fmt: skip


def doctor(*words: str | Path, path: Path | None = None) -> subprocess.CompletedProcess:
    """Run the command; path: a folder of packages that come first."""
    variables = environment()
    if path is not None:
        variables["PYTHONPATH"] = f"{path}:{variables['PYTHONPATH']}"
    return subprocess.run(
        [sys.executable, "-m", "gengram_megatron", "doctor", *map(str, words)],
        cwd=ROOT, env=variables, capture_output=True, text=True, timeout=600,
    )  # fmt: skip


@pytest.fixture
def tiny(tmp_path):
    """A config file; its data set is not there, which is no business of the doctor's."""
    return write_config(tmp_path / "tiny.yaml", tmp_path / "data")


def test_a_healthy_config(tiny, tmp_path, one_process, capsys):
    run = tmp_path / "runs" / "new"
    words = [f"run.dir={run}", "optimizer.lr=1e-3"]
    done = doctor(tiny, *words, "--json")
    found = json.loads(done.stdout)
    assert (done.returncode, found["problems"]) == (0, [])
    assert parts_of_the_run(tiny, words, one_process).items() <= used(found).items()
    assert all(one["why"] for one in found["parts"].values())
    assert "tokens per step and rank" in found["parts"]["memory"]["why"]
    assert found["plan"]["projection"]["reason"] == found["parts"]["memory"]["why"]
    assert found["extensions"]["Adam"]["found"] == "torch"
    folder, measured = found["folder"], found["measured"]
    assert folder["path"] == str(run)
    assert not run.parent.exists()  # nothing stays of the measurement
    assert folder["checkpoint_bytes"] == estimated_size(load_config(tiny, words, Config))
    figures = [
        folder["free_bytes"],
        folder["speed"]["written_bytes_per_second"],
        folder["speed"]["read_bytes_per_second"],
        measured["all_reduce"]["bytes_per_second"],
        *measured["matrix_product"]["tflops"].values(),
    ]
    assert len(figures) == 6
    assert all(isfinite(figure) and figure > 0 for figure in figures)
    show(found)
    shown = capsys.readouterr().out
    for line in ("matrix product in bf16", "all-reduce of 2 processes", "memory", "MB written"):
        assert line in shown


@pytest.mark.thorough
def test_packages_that_fail(tiny, tmp_path, one_process):
    """One raises, one kills its process; megatron-core does without both, and so does the run."""
    packages = tmp_path / "packages"
    put_package(packages, "apex", "0.9", "raise ImportError('it wants another torch')")
    put_package(packages, "deepspeed", "0.19", "import os; os.abort()")
    words = [f"run.dir={tmp_path / 'run'}", *DENSE, *MLA, "train.precision=bf16"]
    done = doctor(tiny, *words, "--json", "--no-speeds", path=packages)
    found = json.loads(done.stdout)
    assert (done.returncode, found["problems"]) == (0, [])
    software = found["software"]
    assert software["apex"] == {"version": "0.9", "error": "ImportError: it wants another torch"}
    assert software["deepspeed"] == {"version": "0.19", "error": "killed by SIGABRT"}
    assert any(line.startswith("apex is installed, but") for line in found["advice"])
    assert found["measured"] is found["folder"]["speed"] is None
    assert used(found)["experts"] == "none"
    assert found["parts"]["experts"]["why"] == "model.num_experts is null: a dense model"
    expected = parts_of_the_run(tiny, words, one_process)
    del expected["experts"]
    assert expected.items() <= used(found).items()


@pytest.mark.thorough
def test_what_megatron_needs_fails(tmp_path):
    """Without a config: what is wrong with the machine."""
    put_package(tmp_path, "transformer_engine", "2.1", "raise RuntimeError('no libcudart')")
    done = doctor("--no-speeds", path=tmp_path)
    assert done.returncode == 1
    assert "transformer-engine" in done.stdout
    assert "megatron-core does not work here: RuntimeError: no libcudart" in done.stdout


def test_torch_that_fails(tiny, tmp_path):
    """With a config that wants a process for each GPU."""
    packages = tmp_path / "packages"
    put_package(packages, "torch", "9.9", "raise ImportError('no libc10')")
    done = doctor(tiny, f"run.dir={tmp_path / 'run'}", "--no-speeds", "--json", path=packages)
    assert done.returncode == 1, done.stderr
    assert json.loads(done.stdout)["problems"] == [
        "torch does not work here: ImportError: no libc10"
    ]


def test_quick_needs_no_torch_and_says_what_it_left_out(tiny, tmp_path):
    packages = tmp_path / "packages"
    put_package(packages, "torch", "9.9", "import time; time.sleep(1000)")
    put_package(packages, "apex", "0.9", "import time; time.sleep(1000)")
    words = [tiny, f"run.dir={tmp_path / 'run'}", "--quick"]
    done = doctor(*words, "--json", path=packages)  # to import one of them would outlast it
    found = json.loads(done.stdout)
    assert (done.returncode, found["problems"]) == (0, [])
    assert found["software"]["torch"]["version"] == "9.9"
    assert found["plan"]["processes"] == 1 and found["folder"]["free_bytes"] > 0
    assert found["parts"] is found["measured"] is found["folder"]["speed"] is None
    assert len(found["left_out"]) == 2
    shown = doctor(*words, path=packages)
    assert shown.stdout.count("left out: ") == 2 and "torch is built for" not in shown.stdout


def test_quick_takes_gpus_from_nvidia_smi(tiny, tmp_path, monkeypatch):
    tool = tmp_path / "bin/nvidia-smi"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\necho 'Small, 1, 8.0'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    done = doctor(tiny, f"run.dir={tmp_path / 'run'}", "--quick", "--json")
    found = json.loads(done.stdout)
    assert found["devices"]["gpus"] == [
        {"name": "Small", "bytes": 1 << 20, "compute_capability": "8.0"}
    ]
    assert done.returncode == 1
    [problem] = found["problems"]
    assert "Small has 0.0 GB" in problem


@pytest.mark.parametrize("says", ["", "print('Loading ...')"], ids=["nothing", "no JSON"])
def test_a_process_that_talks_nonsense_gives_no_answer(tmp_path, monkeypatch, says):
    """It dies with success, as a package may have it that ends its process when it is imported."""
    put_package(
        tmp_path, "torch", "9.9", f"{says}\nimport os, sys; sys.stdout.flush(); os._exit(0)"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    with pytest.raises(NoAnswer, match="its last line is not JSON"):
        ask("machine", "devices")


def test_a_tool_that_hangs_is_not_waited_for(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nexec sleep 60\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(examine, "LINKS_SECONDS", 0.5)
    assert examine._links() is None


CANNOT_RUN = {
    "model.implementation=transformer_engine": "transformer_engine, which is not installed here",
    "launch.processes=3": "the world size is 3, which is not a multiple of",
    "run.dir={file}/run": "cannot be created: Not a directory",
}
"""Words that make a config unfit for this machine, and what the reason says."""


@pytest.mark.thorough
def test_a_config_that_cannot_run_here(tiny):
    words = [word.format(file=tiny) for word in CANNOT_RUN]
    done = doctor(tiny, "parallel.tensor=2", *words, "--no-speeds")
    assert done.returncode == 1, done.stderr
    start = "cannot run here: "
    reasons = [line for line in done.stdout.splitlines() if line.startswith(start)]
    assert len(reasons) == len(CANNOT_RUN)
    for reason, says in zip(reasons, CANNOT_RUN.values()):
        assert says in reason


def test_memory_that_does_not_suffice(tiny, tmp_path):
    config = load_config(tiny, [f"run.dir={tmp_path}", "launch.processes=3"], Config)
    gpus = [{"name": "large", "bytes": 80 * 10**9}, {"name": "small", "bytes": 24 * 10**9}]
    assert list(memory_problems(config, 10**9, [])) == []
    assert list(memory_problems(config, 10**9, gpus * 2)) == []
    [on_cpu] = memory_problems(config, 10**15, [])
    assert on_cpu.startswith("3 processes need about 1000000.0 GB each, and this machine has")
    [too_few] = memory_problems(config, 10**9, gpus)
    assert too_few.startswith(
        "launch.processes is 3, one for each GPU of a node, but here there are 2;"
    )
    [too_small] = memory_problems(config, 30 * 10**9, gpus * 2)
    assert too_small.startswith("a rank needs about 30.0 GB, and small has 24.0 GB")


def test_room_that_does_not_suffice():
    assert list(room_problems(free=100, checkpoint=100)) == []
    [problem] = room_problems(free=2 * 10**9, checkpoint=5 * 10**9)
    assert problem.startswith("one checkpoint needs about 5.0 GB, and run.dir has 2.0 GB free")


def test_the_sample_of_any_memory_can_be_built() -> None:
    words = [
        "model.gengram.kmer_sizes=[1,12]",
        "model.gengram.hashing.rows=5000",
        "model.gengram.window=64",
    ]
    config = load_config(ROOT / "configs/smoke/cpu.yaml", words, Config)
    assert check_layout(sample(config, Projection("features", "")), 1)


def put_package(folder: Path, name: str, version: str, source: str) -> None:
    """A package as an installer leaves it."""
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(source + "\n")
    facts = folder / f"{name}-{version}.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def used(found: dict) -> dict[str, str]:
    """The table of parts, which must be whole."""
    assert set(found["parts"]) == PARTS
    return {part: one["uses"] for part, one in found["parts"].items()}


def parts_of_the_run(file: Path, words: list[str], one_process) -> dict[str, str | None]:
    """What the run's own model says, all layers of it."""
    from gengram_megatron.engine.model.build import build_model, wrap_for_data_parallelism
    from gengram_megatron.engine.training.optimizer import build_optimizer
    from gengram_megatron.engine.training.report import part_implementations

    config = load_config(file, words, Config)
    layout = check_layout(config, 1)
    chunks = wrap_for_data_parallelism(
        build_model(config, with_gengram(layout, config)), config, layout
    )
    return part_implementations(chunks, build_optimizer(config, chunks))
