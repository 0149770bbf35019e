"""The processes that go through sources."""

import os
import platform
import signal
import subprocess
import sys

import pytest

from data_prep import workers
from data_prep.workers import Advance, Workers
from gengram_megatron.errors import UserError

ROUNDS, BLOCKS = 50, 6
USE_BLOCKS = f"""
import resource
from data_prep.workers import Workers

def faults(task, advance):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range({ROUNDS}):
        blocks = [b"1" * (1 << 20) for _ in range({BLOCKS})]
        del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

with Workers(COUNT) as workers:
    print(*(found for _, found in workers.run(faults, [1, 2], lambda bases: None)))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
@pytest.mark.parametrize("count", [1, 2])
def test_freed_memory_is_not_mapped_anew(count):
    program = USE_BLOCKS.replace("COUNT", str(count))
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout
    pages = (1 << 20) // 4096
    for faults in map(int, found.split()):
        assert faults < 2 * BLOCKS * pages  # one round's, instead of all rounds'


def _killed_while_it_counts(_: int, __: Advance) -> None:
    workers._shared["amount"].get_lock().acquire()
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.timeout(60)
def test_worker_that_is_killed_while_it_counts_stops_nobody():
    with (
        Workers(2) as pool,
        pytest.raises(UserError, match=r"worker process ended unexpectedly.*key workers"),
    ):
        list(pool.run(_killed_while_it_counts, [1, 2], lambda bases: None))


INTERRUPT_AT_EVERY_LINE = """
import faulthandler, os, signal, sys, time
from data_prep.workers import Workers

def count(task, advance):
    for _ in range(20):
        advance(1)
        time.sleep(0.0005)

def interrupt_at(line):
    left = line
    def trace(frame, event, _):
        nonlocal left
        if event == "line":
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGINT)
        return trace
    return trace

for line in range(1, 260):
    faulthandler.dump_traceback_later(20, exit=True)  # instead of a hang
    interrupted = False
    try:
        with Workers(2) as workers:
            sys.settrace(interrupt_at(line))
            try:
                list(workers.run(count, [1, 2], lambda amount: None))
            finally:
                sys.settrace(None)
    except KeyboardInterrupt:
        interrupted = True
    if line == 1:
        assert interrupted
print(interrupted)
"""


def test_an_interrupt_at_any_line_ends_the_work():
    """Also while a lock of the pool is held, which its own thread would then wait for."""
    command = [sys.executable, "-c", INTERRUPT_AT_EVERY_LINE]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True"]
