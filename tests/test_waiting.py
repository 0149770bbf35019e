"""How long a step has waited for its samples."""

import time
from pathlib import Path

import pytest
import torch.distributed as dist
import torch.multiprocessing as processes

from gengram_megatron.engine.data.batches import BatchStream
from gengram_megatron.engine.platform import prepare
from gengram_megatron.engine.training.step import slowest_rank
from tests.test_batches import InSequence, Numbered

READING = (0.02, 0.1)  # seconds a sample, of each rank
WORK = 2.0  # seconds between two steps, which are not to be counted


class Slow(Numbered):
    def __init__(self, seconds: float):
        self._seconds = seconds

    def __getitem__(self, index):
        time.sleep(self._seconds)
        return super().__getitem__(index)


def measure(rank: int, folder: str) -> None:
    """Three samples, with work in between that is no waiting; then none."""
    prepare()
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    sizes = {"global_batch_size": 2, "micro_batch_size": 1, "data_rank": rank, "data_size": 2}
    stream = BatchStream(
        Slow(READING[rank]), InSequence(), consumed=0, total=None, workers=0, **sizes
    )
    for _ in range(3):
        next(stream)
        time.sleep(WORK)
    waited = [slowest_rank(stream.pop_seconds_waited()) for _ in range(2)]
    (Path(folder) / str(rank)).write_text(" ".join(map(str, waited)))
    dist.destroy_process_group()


@pytest.mark.thorough
def test_a_step_has_waited_as_long_as_its_slowest_rank(tmp_path):
    processes.spawn(measure, (str(tmp_path),), nprocs=2)
    waited = [[float(word) for word in (tmp_path / rank).read_text().split()] for rank in "01"]
    assert waited[0] == waited[1]
    assert 3 * READING[1] <= waited[0][0] < 3 * WORK
    assert waited[0][1] == 0
