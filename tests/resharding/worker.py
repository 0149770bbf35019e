"""One rank that writes or reads the checkpoint of a pair of layouts.

OUT/<run>.pt: what the run had at the checkpoint, and its steps after it.
"""

import os
import random
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from gengram_megatron.config.layout import check_layout
from gengram_megatron.config.schema import Config
from gengram_megatron.engine.data.run_data import RunData
from gengram_megatron.engine.processes import end_processes, start_processes
from tests.resharding.cases import AFTER, BEFORE, PAIRS


class TinyRun:
    """The parts of a run on one rank, and its steps."""

    def __init__(self, config: Config, processes: int):
        from megatron.core import parallel_state

        from gengram_megatron.engine.checkpoint.state import TrainingState
        from gengram_megatron.engine.model.build import build_model, wrap_for_data_parallelism
        from gengram_megatron.engine.training.optimizer import build_optimizer, build_schedule

        self.config, self.layout = config, check_layout(config, processes)
        self.data = RunData(config)
        start_processes(self.layout, config.run.seed, int(os.environ["RANK"]))
        self.data_rank = parallel_state.get_data_parallel_rank()
        self.chunks = wrap_for_data_parallelism(
            build_model(config, self.layout), config, self.layout
        )
        self.optimizer = build_optimizer(config, self.chunks)
        self.schedule = build_schedule(config, self.layout, self.optimizer)
        self.state = TrainingState(
            config, self.layout, self.chunks, self.optimizer, self.schedule, self.data.facts
        )

    def steps(self, start: int, count: int) -> list[tuple[float, float]]:
        """Loss and learning rate of so many steps."""
        from megatron.core.optimizer_param_scheduler import get_canonical_lr_for_logging

        from gengram_megatron.engine.training.step import forward_backward, reduce_step_status

        batch, done = self.config.train.global_batch_size, []
        batches = self.data.training(self.layout, self.data_rank, start * batch)
        for _ in range(count):
            for chunk in self.chunks:
                chunk.zero_grad_buffer()
            self.optimizer.zero_grad()
            report = forward_backward(
                self.chunks, next(batches), self.config, self.layout, forward_only=False
            )
            lr = get_canonical_lr_for_logging(self.optimizer.param_groups)
            self.optimizer.step_if(lambda _: True)
            self.schedule.step(batch)
            done.append((reduce_step_status(report).loss, lr))
        return done

    def holds(self) -> dict:
        """All that it has learned, and what the generators of each rank draw next."""
        from tests.resharding.gather import full_tensors

        own = (random.random(), float(np.random.rand()), float(torch.rand(())))
        draws = [None] * dist.get_world_size()
        dist.all_gather_object(draws, own)
        return {"tensors": full_tensors(self.chunks, self.optimizer), "draws": draws}


def write(run: TinyRun) -> dict:
    """Train, save, and go on as if nothing were."""
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(dist.get_rank())
    run.steps(0, BEFORE)
    assert run.state.save(BEFORE, required=True) is None and run.state.wait() is None
    return {**run.holds(), "steps": run.steps(BEFORE, AFTER)}


def read(run: TinyRun) -> dict:
    """Go on from the newest checkpoint."""
    start = run.state.load_newest().step
    return {"start": start, **run.holds(), "steps": run.steps(start, AFTER)}


def run(name: str, source: bool, file: Path, out: Path) -> None:
    """One side of a pair, in a group of its own; the first rank saves what it found."""
    pair, rank = PAIRS[name], int(os.environ["RANK"])
    side = pair.source if source else pair.target
    result = pair.source_name if source else name
    config = pair.config(file, side, out / pair.source_name)
    store = dist.FileStore(str(out / f"{result}.store"), side.processes)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=side.processes)
    tiny = TinyRun(config, side.processes)
    found = write(tiny) if source else read(tiny)
    if rank == 0:
        torch.save(found, out / f"{result}.pt")
    end_processes()
