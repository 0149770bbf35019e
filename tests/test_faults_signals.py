"""A run that is asked to stop saves, exits with the code for requeueing, and goes on later with
the numbers of one that was never stopped."""

import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from gengram_megatron.signals import REQUEUE, StopSignals
from tests.training import broken
from tests.training.faults import STEPS, Lab
from tests.training.tiny import environment, numbers

SETTINGS = (
    "train.validation_interval=1",  # whenever a signal comes, a validation is due
    "optimizer.overlap_grad_reduce=true",
    "optimizer.overlap_param_gather=true",
)


@pytest.fixture(scope="module")
def whole(lab: Lab) -> list[dict]:
    """The numbers of a run that nobody asks to stop."""
    ended = lab.start("validated", *SETTINGS).wait()
    assert [said.code for said in ended] == [0, 0], ended[0].err
    return numbers(lab.run("validated"))


@pytest.mark.parametrize(
    ("number", "rank", "helpers"),
    [
        (signal.SIGUSR1, 1, False),  # one of the ranks only, and not the one that speaks
        (signal.SIGTERM, 0, True),  # its data reader and checkpoint writer too
        (signal.SIGINT, 0, True),  # as a terminal does on Ctrl-C
    ],
)
def test_signal_saves_and_asks_to_be_started_again(
    lab: Lab, whole: list[dict], number: signal.Signals, rank: int, helpers: bool
) -> None:
    name = number.name
    ranks = lab.start(name, *SETTINGS)
    ranks.wait_for(lambda: lab.steps(name) >= 5)
    ranks.signal(rank, number, helpers)
    stopped = ranks.wait()
    done = lab.steps(name)
    assert 5 <= done < STEPS
    assert [said.code for said in stopped] == [REQUEUE, REQUEUE], stopped[0].err
    assert f"asked by a signal to stop; saved after step {done} of {STEPS}" in stopped[0].out
    assert lab.checkpoints(name)[-1] == done
    validated = [line["step"] for line in numbers(lab.run(name), "validation")]
    assert validated == [*range(1, done)]  # the last one is left for later
    ended = lab.start(name, *SETTINGS, attempt="second").wait()
    assert [said.code for said in ended] == [0, 0], ended[0].err
    assert f"resuming after step {done}," in ended[0].out
    assert numbers(lab.run(name)) == whole


@pytest.mark.parametrize("step", [6, STEPS])
def test_validation_is_left_to_the_job_that_goes_on(lab: Lab, whole: list[dict], step: int) -> None:
    """A request to stop is heeded between its batches (here: there are two), also at the end."""
    name = f"validating_{step}"
    stop = partial(broken.signal_at, rank=1, method="_validate", number=signal.SIGTERM, step=step)
    stopped = lab.start(name, *SETTINGS, before=stop).wait()
    assert [said.code for said in stopped] == [REQUEUE, REQUEUE], stopped[0].err
    assert lab.checkpoints(name)[-1] == step
    validated = [line["step"] for line in numbers(lab.run(name), "validation")]
    assert validated == [*range(1, step)]
    ended = lab.start(name, *SETTINGS, attempt="second").wait()
    assert [said.code for said in ended] == [0, 0], ended[0].err
    assert numbers(lab.run(name)) == whole


def test_signal_before_the_first_step_leaves_no_trace(lab: Lab) -> None:
    stop = partial(broken.signal_at, rank=1, method="__init__", number=signal.SIGINT)
    ended = lab.start("early", before=stop).wait()
    assert [said.code for said in ended] == [REQUEUE, REQUEUE], ended[0].err
    assert "nothing to save after step 0" in ended[0].out
    assert not lab.run("early").exists()


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    """The files of a run's folder, when each was written and how large it is."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in files}


def test_run_that_is_done_or_refused_changes_nothing(lab: Lab) -> None:
    shutil.copytree(lab.run("whole"), lab.run("done"))
    before = contents(lab.run("done"))
    ended = lab.start("done", "optimizer.lr=0.5").wait()
    assert [said.code for said in ended] == [0, 0], ended[0].err
    assert "nothing is left to do" in ended[0].out
    assert contents(lab.run("done")) == before
    refused = lab.start("done", "model.norm_epsilon=0.1", attempt="refused").wait()
    assert [said.code for said in refused] == [2, 2]
    assert contents(lab.run("done")) == before


def test_second_interrupt_ends_the_process_at_once() -> None:
    """The first one is noted, and announced to the person at the keyboard."""
    program = (
        "import signal\nfrom gengram_megatron.signals import StopSignals\n"
        "with StopSignals(announce=True) as signals:\n"
        "    signal.raise_signal(signal.SIGINT)\n"
        "    signal.raise_signal(signal.SIGTERM)\n"
        "    print(signals.received, flush=True)\n"
        "    signal.raise_signal(signal.SIGINT)\n"
        "    print('goes on')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(), capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (-signal.SIGINT, "True\n")
    assert "again: ends without saving" in done.stderr


def test_handlers_are_put_back_unless_a_signal_came() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals() as signals:
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before and not signals.received
    try:
        with StopSignals() as signals:
            signal.raise_signal(signal.SIGTERM)
        assert signals.received
        signal.raise_signal(signal.SIGTERM)  # a launcher's second one: no harm
    finally:
        signal.signal(signal.SIGTERM, before)
