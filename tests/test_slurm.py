"""`gengram launch --slurm` and `gengram sweep --slurm` on a real Slurm: slurmctld, slurmd and munge
on this machine."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, cluster, why_not
from tests.training.launch import gengram
from tests.training.tiny import build_data, losses, write_config

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
]

CPU = "launch.slurm.gpus=0"


@pytest.fixture(scope="module")
def slurm() -> Iterator[Cluster]:
    with cluster() as this:
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


def test_two_tasks_train_to_the_end_as_one_process_does(
    slurm: Cluster, tiny: Path, tmp_path: Path
) -> None:
    run = tmp_path / "slurm"
    words = ("launch", str(tiny), "--slurm", "--nproc", "2", CPU, f"run.dir={run}")
    job = submitted(slurm, *words)
    assert slurm.wait(job) == ["COMPLETED"], logs_of(run)
    assert gengram("train", str(tiny), f"run.dir={tmp_path / 'alone'}").code == 0
    assert losses(run) == pytest.approx(losses(tmp_path / "alone"), rel=1e-5)
    assert sorted(path.name for path in (run / f"logs/job-{job}.0").iterdir()) == [
        "rank-0.log",
        "rank-1.log",
    ]
    assert "2 x CPU" in (run / f"logs/job-{job}.0/rank-0.log").read_text()


def logs_of(run: Path) -> str:
    """All logs of a run, for a failure's message."""
    return "\n".join(f"{log}:\n{log.read_text()[-3000:]}" for log in run.glob("logs/**/*.log"))
