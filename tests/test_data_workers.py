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
    with Workers(2) as pool, pytest.raises(UserError, match="was ended from outside"):
        list(pool.run(_killed_while_it_counts, [1, 2], lambda bases: None))
