"""One rank of a group of processes that runs a layout case.

Rank 0 writes OUT/<mode>_<case>.pt with the loss and the gradient of every parameter at its full
shape.
"""

from pathlib import Path

import torch
import torch.distributed as dist

from gengram_megatron.config.layout import check_layout, world_size_from_environment
from gengram_megatron.engine.model.build import build_model, wrap_for_data_parallelism
from gengram_megatron.engine.model.initialize import sharded_parameters
from gengram_megatron.engine.processes import end_processes, start_processes
from gengram_megatron.engine.training.optimizer import build_optimizer
from gengram_megatron.engine.training.step import forward_backward, reduce_step_status
from tests.layouts.cases import config_of

EOD, BASES = 12, torch.tensor([8, 5, 6, 7, 9], dtype=torch.uint8)


def batch(samples: int, seq_length: int) -> torch.Tensor:
    """Different random fragments, some N and an EOD inside: [samples, seq_length + 1]."""
    generator = torch.Generator().manual_seed(3)
    tokens = BASES[torch.randint(0, 5, (samples, seq_length + 1), generator=generator)]
    tokens[:, -1] = EOD
    tokens[1::2, seq_length // 3] = EOD
    tokens[0::2, seq_length // 2] = EOD  # as many scored tokens in every sample
    return tokens


def gradients(chunks) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    """Every parameter's gradient at its full shape, put together on rank 0. Copies of one part
    on several ranks must agree. And how many elements of it lie on ranks that hold no copy of
    another rank's: those that a checkpoint is written from."""
    own = []
    for chunk in chunks:
        for part, parameter, start in sharded_parameters(chunk.module):
            grad = parameter.main_grad.flatten()[start : start + part.data.numel()]
            first = part.replica_id in (0, (0, 0, 0))
            grad = grad.view(part.local_shape)
            own.append((part.key, part.global_shape, part.global_offset, grad, first))
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, own)
    full, once = {}, {}
    for key, shape, offset, grad, first in (item for rank in gathered for item in rank):
        once[key] = once.get(key, 0) + first * grad.numel()
        tensor = full.setdefault(key, torch.full(shape, float("nan")))
        place = tuple(slice(o, o + n) for o, n in zip(offset, grad.shape))
        if not tensor[place].isnan().all():
            torch.testing.assert_close(tensor[place], grad, rtol=1e-6, atol=1e-9, msg=key)
        tensor[place] = grad
    return full, once


def run(name: str, mode: str, out: Path) -> None:
    """One case, mode alone or split: initial weights from the seed, one step, loss and gradients to
    a file."""
    world, rank = world_size_from_environment()
    config = config_of(name, alone=mode == "alone")
    layout = check_layout(config, world)
    store = dist.FileStore(str(out / f"{mode}_{name}.store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    start_processes(layout, config.run.seed, rank)
    from megatron.core import parallel_state

    chunks = wrap_for_data_parallelism(build_model(config, layout), config, layout)
    build_optimizer(config, chunks)
    tokens = batch(config.train.global_batch_size, config.model.seq_length)
    data_rank = parallel_state.get_data_parallel_rank()
    micro = tokens.split(config.train.micro_batch_size)
    report = forward_backward(
        chunks, micro[data_rank :: layout.data], config, layout, forward_only=False
    )
    full, once = gradients(chunks)
    result = {"loss": reduce_step_status(report).loss, "gradients": full, "held_once": once}
    if rank == 0:
        torch.save(result, out / f"{mode}_{name}.pt")
    end_processes()
