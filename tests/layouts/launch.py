"""Groups of real processes for the tests."""

import os
import tempfile
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path

from tests.forked import context

ROOT = Path(__file__).parents[2]


def launch(
    processes: int, function: Callable, *words, seconds: float = 600, context=context
) -> None:
    """Call a function of the tests on so many ranks, which find their number and how many there are
    in the environment; fail with the ranks' own output. context: how they are started."""
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / str(rank) for rank in range(processes)]
        ranks = [
            context.Process(target=_rank, args=(rank, processes, outputs[rank], function, words))
            for rank in range(processes)
        ]
        for process, output in zip(ranks, outputs):
            output.touch()
            process.start()
        failed = _first_to_fail(ranks, seconds)
        for process in ranks:
            process.kill()
            process.join()
        said = "\n".join(f"rank {out.name}:\n{out.read_text()[-4000:]}" for out in outputs)
        assert failed is None, f"{function.__name__}{words}, rank {failed}:\n{said}"


def _first_to_fail(ranks: list, seconds: float) -> int | None:
    """Waits until all have ended or one has failed; a rank that takes too long has failed."""
    left = {process.sentinel: rank for rank, process in enumerate(ranks)}
    while left:
        ended = wait(left, seconds)
        if not ended:
            return min(left.values())
        for rank in (left.pop(sentinel) for sentinel in ended):
            ranks[rank].join()
            if ranks[rank].exitcode:
                return rank
    return None


def _rank(rank: int, processes: int, output: Path, function: Callable, words: tuple) -> None:
    for descriptor in (1, 2):
        os.dup2(os.open(output, os.O_WRONLY | os.O_APPEND), descriptor)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes))
    function(*words)
