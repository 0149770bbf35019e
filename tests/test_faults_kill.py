"""Kill -9 at any moment loses the steps since the last checkpoint, and nothing else."""

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from gengram_megatron.errors import UserError
from gengram_megatron.runs.folder import locked
from tests.layouts.launch import ROOT
from tests.training.faults import COMMON, INTERVAL, STEPS, Lab
from tests.training.launch import children, kill, wait_for
from tests.training.ranks import Ranks
from tests.training.tiny import environment, numbers

pytestmark = pytest.mark.timeout(2400)

LAUNCHER_SECONDS = 5
"""After which a launcher kills the ranks that a dead one has left waiting for it."""


def test_kill_in_the_middle_of_a_save(lab: Lab) -> None:
    """Its half-written checkpoint is passed over; the one before is there."""
    ranks = lab.start("in_save")
    folder = lab.run("in_save") / "checkpoints"
    ranks.wait_for(lambda: lab.checkpoints("in_save") and [*folder.glob("*.partial")])
    ranks.signal(0, signal.SIGKILL)
    killed = ranks.wait(LAUNCHER_SECONDS)
    assert killed[0].code == -signal.SIGKILL and killed[1].code not in (0, None)
    saved = lab.checkpoints("in_save")[-1]
    assert saved < STEPS
    ended = lab.start("in_save", attempt="second").wait()
    assert [said.code for said in ended] == [0, 0], ended[0].err
    assert f"resuming after step {saved}," in ended[0].out
    assert numbers(lab.run("in_save")) == numbers(lab.run("whole"))
    assert not [*folder.glob("*.partial")]


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.thorough)])
def test_kills_at_random_moments(lab: Lab, kills: int) -> None:
    """One run is killed and started again, over and over; when it ends, another one begins."""
    draw, run, done = random.Random(kills), 0, 0
    name = f"random_{kills}_{run}"
    while True:
        ranks = lab.start(name, attempt=f"after_{done}_kills")
        if done < kills:
            _kill_at_random(ranks, draw)
            done += 1
            said = ranks.wait(LAUNCHER_SECONDS)
        else:
            said = ranks.wait()
            assert [each.code for each in said] == [0, 0], said[0].err
        if said[0].code == 0:
            assert numbers(lab.run(name)) == numbers(lab.run("whole"))
            if done == kills:
                break
            name = f"random_{kills}_{(run := run + 1)}"
        else:
            assert all(step % INTERVAL == 0 for step in lab.checkpoints(name))


def _kill_at_random(ranks: Ranks, draw: random.Random) -> None:
    """One of the two ranks: while it starts, or some steps later, or never if it ends before."""
    steps, pause, rank = draw.randrange(INTERVAL + 2), draw.random() * 0.3, draw.randrange(2)
    ranks.wait_for(lambda: ranks.ended() or ranks.said()[0].out.count("tokens/s") >= steps)
    time.sleep(pause)
    if not ranks.ended():
        ranks.signal(rank, signal.SIGKILL)


def test_second_run_in_one_folder_is_refused(lab: Lab) -> None:
    ranks = lab.start("shared")
    ranks.wait_for(lambda: lab.steps("shared") >= 1)
    (refused,) = lab.start("shared", count=1, attempt="second").wait()
    assert refused.code == 2
    holder = f"process {ranks.processes[0].pid} on {os.uname().nodename}"
    assert f"run.dir {lab.run('shared')} is in use by another run, {holder}" in refused.err
    with pytest.raises(UserError, match="in use"), locked(lab.run("shared")):
        pass
    ranks.kill()
    with locked(lab.run("shared")):  # a lock ends with its process
        pass


@pytest.mark.thorough
@pytest.mark.slow
def test_elastic_restart_by_torchrun(lab: Lab) -> None:
    name, output = "elastic", lab.folder / "elastic.log"
    words = ["train", str(lab.config), f"run.dir={lab.run(name)}", *COMMON]
    words += ["checkpoint.asynchronous=false"]  # so that there is one when the next step is done
    runner = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = ["python", *runner, "--max-restarts=1", "-m", "gengram_megatron", *words]
    with output.open("w") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment(), stdout=file, stderr=subprocess.STDOUT
        )
    try:
        wait_for(lambda: lab.steps(name) >= INTERVAL + 1, process, output)
        os.kill(_rank_of_torchrun(process.pid, 1), signal.SIGKILL)
        assert process.wait(300) == 0, output.read_text()
    finally:
        kill(process)
    assert f"resuming after step {INTERVAL}," in output.read_text()
    assert numbers(lab.run(name)) == numbers(lab.run("whole"))


def _rank_of_torchrun(pid: int, rank: int) -> int:
    """The process that torchrun started for a rank (not the ones that this one started)."""
    for child in children(pid):
        variables = Path(f"/proc/{child}/environ").read_text().split("\0")
        if f"RANK={rank}" in variables:
            return child
    raise AssertionError(f"torchrun has no rank {rank}")
