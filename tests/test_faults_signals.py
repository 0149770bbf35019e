"""A run that is asked to stop saves, exits with the code for requeueing, and goes on later with
the numbers of one that was never stopped."""

import signal

import pytest

from gengram_megatron.signals import REQUEUE, StopSignals
from tests.training.faults import STEPS, Lab
from tests.training.tiny import numbers

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
