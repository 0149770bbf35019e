"""`gengram launch --slurm` and `gengram sweep --slurm` on a real Slurm: slurmctld, slurmd and munge
on this machine."""

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import yaml

from tests.layouts.launch import ROOT
from tests.slurm.cluster import Cluster, DoesNotStart, cluster, why_not
from tests.training.at_start import BROKEN
from tests.training.launch import gengram
from tests.training.tiny import build_data, losses, numbers, write_config

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
]

CPU = "launch.slurm.gpus=0"


@pytest.fixture(scope="module")
def slurm() -> Iterator[Cluster]:
    with ExitStack() as stack:
        try:
            this = stack.enter_context(cluster())
        except DoesNotStart as error:
            pytest.skip(str(error))
        yield this


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    data = build_data(tmp_path_factory.getbasetemp() / "dna_64")
    return write_config(tmp_path_factory.mktemp("slurm") / "tiny.yaml", data)


def submitted(slurm: Cluster, *words: str) -> str:
    """The number of the job that a command put into the queue."""
    done = gengram(*words, **slurm.environment)
    assert done.code == 0, done.out + done.err
    return re.search(r"job (\d+)", done.out)[1]


def logs_of(run: Path) -> str:
    """All logs of a run, for a failure's message."""
    return "\n".join(f"{log}:\n{log.read_text()[-3000:]}" for log in run.glob("logs/**/*.log"))


def words(tiny: Path, run: Path, *more: str) -> tuple[str, ...]:
    """Of a run on two tasks."""
    common = ("--slurm", "--nproc", "2", CPU, "train.steps=60", f"run.dir={run}")
    return ("launch", str(tiny), *common, *more)


# Read by Python at its start: until the job goes back into the queue, each step takes two seconds
# longer, so that the time limit comes before the end on fast and slow machines.
UNHURRIED = """
import os, time
if "SLURM_PROCID" in os.environ and "SLURM_RESTART_COUNT" not in os.environ:
    from gengram_megatron.runs.metrics import RunLog
    fast = RunLog.train
    def train(self, **numbers):
        time.sleep(2)
        fast(self, **numbers)
    RunLog.train = train
"""


@pytest.mark.thorough
def test_time_limit_requeue_and_the_same_losses(slurm: Cluster, tiny: Path, tmp_path: Path) -> None:
    """Slurm looks at time limits every 30 seconds and sends a signal a round early rather than
    late: this one 60 to 90 seconds after the start. Until the limit a slow machine has 150 more."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    (tmp_path / "sitecustomize.py").write_text(UNHURRIED)
    limit = ("launch.slurm.time=4", "launch.slurm.save_before=150")
    environment = f"launch.environment={{PYTHONPATH: '{tmp_path}:{ROOT}'}}"
    cut_job = submitted(slurm, *words(tiny, cut, *limit, environment))
    whole_job = submitted(slurm, *words(tiny, whole))
    said = cut / f"logs/job-{cut_job}.log"
    slurm.until(lambda: said.exists() and "saved and stopped" in said.read_text())
    # On a slow machine the next limit would come before the first step.
    slurm.ask("scontrol", "update", f"JobId={cut_job}", "TimeLimit=60")
    assert slurm.wait(whole_job) == ["COMPLETED"], logs_of(whole)
    assert slurm.wait(cut_job) == ["COMPLETED"], logs_of(cut)

    first, second = (cut / f"logs/job-{cut_job}.{n}/rank-0.log" for n in (0, 1))
    assert "asked by a signal to stop" in first.read_text()
    assert "resuming after step" in second.read_text()
    assert numbers(cut) == numbers(whole)  # floats as repr wrote them: every bit
    assert "2 x CPU" in (whole / f"logs/job-{whole_job}.0/rank-0.log").read_text()
    assert (whole / f"logs/job-{whole_job}.0/rank-1.log").exists()


@pytest.mark.thorough
def test_first_rank_that_failed_is_named_in_the_job_s_log(
    slurm: Cluster, tiny: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    (tmp_path / "sitecustomize.py").write_text(BROKEN)
    environment = f"launch.environment={{PYTHONPATH: '{tmp_path}:{ROOT}'}}"
    job = submitted(slurm, *words(tiny, run, environment))
    assert slurm.wait(job) == ["FAILED"]
    said = (run / f"logs/job-{job}.log").read_text()
    assert "rank-1 failed first: RuntimeError: the disk is gone" in said
    log = said.splitlines()[-1].removeprefix("its log: ")
    assert "the disk is gone" in Path(log).read_text()


def test_what_slurm_would_refuse_is_told(slurm: Cluster, tiny: Path, tmp_path: Path) -> None:
    for word, said in {
        "launch.slurm.partition=nowhere": "has no partition nowhere; it has short, tests",
        "launch.slurm={gpus: 0, partition: short, time: 11}": "short allows 10:00",
        "launch.slurm.options=[--constraint=none]": "sbatch refused",
    }.items():
        done = gengram(*words(tiny, tmp_path / "run", word), **slurm.environment)
        assert done.code == 2 and said in done.err
    assert not slurm.ask("squeue", "--noheader")


@pytest.mark.thorough
def test_sweep_as_an_array(slurm: Cluster, tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    sweep = {
        "base": str(tiny),
        "run": {"dir": str(tmp_path / "runs")},
        "launch": {"processes": 1, "slurm": {"gpus": 0}},
        "sweep": {
            "grid": {"model.gengram.window": [None, 6]},
            "runs": {"baseline": {"model.gengram.enabled": False}},
            "at_a_time": 2,
        },
    }
    file.write_text(yaml.safe_dump(sweep))
    launch = ("sweep", str(file), "--launch", "--slurm")
    job = submitted(slurm, *launch, "launch.slurm.options=[--hold]")
    again = gengram(*launch, "--list", **slurm.environment)
    assert "3 runs, 0 finished, 3 in Slurm's queue" in again.out
    assert again.out.count("queued") == 3
    slurm.ask("scontrol", "release", job)
    assert slurm.wait(job) == ["COMPLETED"] * 3, logs_of(tmp_path)
    again = gengram("sweep", str(file), "--launch", "--slurm", "--results", **slurm.environment)
    assert again.code == 0 and "3 runs, 3 finished" in again.out
    collected = json.loads((tmp_path / "runs/results.json").read_text())
    for row in collected:
        assert [row["loss"]] == losses(tmp_path / "runs" / row["name"], "validation")
    assert len({row["loss"] for row in collected}) == 3
