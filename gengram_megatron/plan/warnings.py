"""What a layout allows, and should still be thought about."""

from collections.abc import Iterator

from gengram_megatron.plan.memory import Memory
from gengram_megatron.plan.stages import Split
from gengram_megatron.plan.time import GPUS_A_NODE, stage_flops

GB = 1e9
LARGEST_IDLE = 0.15
LARGEST_UNEVENNESS = 1.1


def warnings(split: Split, memory: Memory, gigabytes: float) -> Iterator[str]:
    """Sentences; none: nothing to say. gigabytes: of one GPU."""
    if memory.total > gigabytes * GB:
        yield (
            f"a rank needs about {memory.total / GB:.1f} GB, more than {gigabytes:g} GB: recompute "
            "more (train.recompute), split further, or see gengram plan --suggest"
        )
    yield from _pipeline(split)
    layout = split.layout
    if layout.tensor > GPUS_A_NODE:
        yield (
            f"parallel.tensor is {layout.tensor}: its ranks talk inside every layer, and a node "
            f"mostly has {GPUS_A_NODE} GPUs"
        )
    if split.zero_stage:
        yield (
            "what ranks send is counted as with megatron-core's optimizer; DeepSpeed sends more: "
            "gradients twice, from ZeRO 2 on after each microbatch, and with ZeRO 3 weights"
        )


def _pipeline(split: Split) -> Iterator[str]:
    layout = split.layout
    microbatches, stages = layout.num_microbatches, layout.pipeline
    if microbatches < stages:
        yield (
            f"{microbatches} microbatches for {stages} pipeline stages: at any moment "
            f"{stages - microbatches} of them are idle; raise train.global_batch_size or lower "
            "parallel.pipeline"
        )
    fill = (stages - 1) / (layout.virtual_pipeline or 1)
    idle = fill / (microbatches + fill)
    if microbatches >= stages and idle > LARGEST_IDLE:
        yield (
            f"each pipeline stage is idle for {idle:.0%} of a step: more microbatches or "
            "parallel.virtual_pipeline make it less"
        )
    work = [stage_flops(split, stage) for stage in range(stages)]
    if max(work) > LARGEST_UNEVENNESS * sum(work) / stages:
        yield (
            f"stage {work.index(max(work)) + 1} of {stages} has "
            f"{max(work) * stages / sum(work) - 1:.0%} more to compute than the mean, and the "
            "others wait for it; see parallel.first_stage_layers and last_stage_layers"
        )
