"""Models of any size as any rank of any layout builds them, in one process and without their
memory: torch's process groups that pretend, and its tensors that have shapes only."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from gengram_megatron.config.layout import Layout
from gengram_megatron.config.schema import Config


@contextmanager
def as_rank(layout: Layout, rank: int) -> Iterator[None]:
    """megatron-core's groups as one rank of a layout sees them; nobody answers."""
    from megatron.core import parallel_state

    from gengram_megatron.engine.processes import create_groups

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.world_size)
    try:
        create_groups(layout, 1, create_gloo_process_groups=False)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def build_shapes(config: Config, layout: Layout) -> list[torch.nn.Module]:
    """This rank's model chunks as they are built for training, but for the numbers in them."""
    from gengram_megatron.engine.model import build

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "current_device", lambda: torch.device("meta"))
        patch.setattr(build, "initialize", lambda chunks, seed: None)
        return build.build_model(config, layout)
