"""What several test files need."""

import pytest


@pytest.fixture(scope="module")
def one_process():
    """megatron-core's groups for this process alone; the layout of such a run."""
    from gengram_megatron.config.layout import Layout
    from gengram_megatron.training.processes import end_processes, start_processes

    layout = Layout(
        world_size=1,
        tensor=1,
        pipeline=1,
        virtual_pipeline=None,
        context=1,
        expert=1,
        expert_tensor=1,
        sequence=False,
        data=1,
        expert_data=1,
        num_microbatches=1,
        steps=1,
        samples=1,
    )
    start_processes(layout, seed=1, rank=0)
    yield layout
    end_processes()
