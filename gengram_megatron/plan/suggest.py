"""Warns of drawbacks of a layout, and suggests other layouts that fit.

Suggestions are sorted by speed; among those about as fast, the one with the fewest changes comes
first.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from math import log
from operator import attrgetter

from gengram_megatron.config.layout import check_layout
from gengram_megatron.config.schema import Config
from gengram_megatron.config.tree import inline_yaml
from gengram_megatron.errors import UserError
from gengram_megatron.plan.memory import Memory, peak_rank
from gengram_megatron.plan.stages import ShardedModel
from gengram_megatron.plan.time import GPUS_PER_NODE, Speed, StepTime, stage_flops, step_time

GB = 1e9
LARGEST_IDLE = 0.15
LARGEST_UNEVENNESS = 1.1


def warnings(sharded: ShardedModel, memory: Memory, gigabytes: float) -> Iterator[str]:
    """Yields a sentence for each drawback of a layout.

    Args:
        gigabytes: memory of one GPU.
    """
    if memory.total > gigabytes * GB:
        yield (
            f"a rank needs about {memory.total / GB:.1f} GB, more than {gigabytes:g} GB: recompute "
            "more (train.recompute), split further, or see gengram plan --suggest"
        )
    yield from _pipeline(sharded)
    layout = sharded.layout
    if layout.tensor > GPUS_PER_NODE:
        yield (
            f"parallel.tensor is {layout.tensor}: its ranks communicate inside every layer, and a "
            f"node usually has {GPUS_PER_NODE} GPUs"
        )
    if sharded.zero_stage:
        yield (
            "communication is estimated for megatron-core's optimizer; DeepSpeed sends more: "
            "gradients twice, from ZeRO 2 on after each microbatch, and with ZeRO 3 also weights"
        )


def _pipeline(sharded: ShardedModel) -> Iterator[str]:
    layout = sharded.layout
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
            f"each pipeline stage is idle for {idle:.0%} of a step: use more microbatches or "
            "parallel.virtual_pipeline to reduce this"
        )
    work = [stage_flops(sharded, stage) for stage in range(stages)]
    if max(work) > LARGEST_UNEVENNESS * sum(work) / stages:
        yield (
            f"stage {work.index(max(work)) + 1} of {stages} has "
            f"{max(work) * stages / sum(work) - 1:.0%} more to compute than the average, and the "
            "others wait for it; see parallel.first_stage_layers and last_stage_layers"
        )


LARGEST_CONTEXT = 16
EQUAL_TIME_RATIO = 1.05
"""Times within this ratio count as equal, and the layout with fewer changes comes first."""
RECOMPUTE = ("none", "selective", "full")
NOT_VARIED = {
    "parallel.sequence": None,
    "parallel.first_stage_layers": None,
    "parallel.last_stage_layers": None,
}
"""Keys that every suggestion sets to null, whatever the config has."""

Settings = dict[str, int | str | None]
"""New values of the config, by key."""


@dataclass(frozen=True)
class Suggestion:
    """A layout with its memory and speed."""

    settings: Settings
    """The keys of the config that have to change for this layout, with their new values."""
    memory: Memory
    time: StepTime

    @property
    def words(self) -> str:
        """The settings as `key=value` overrides for the command line."""
        return " ".join(f"{key}={inline_yaml(value)}" for key, value in self.settings.items())


def suggest(config: Config, gpus: int, gigabytes: float, speed: Speed) -> list[Suggestion]:
    """Returns all layouts of a config on this number of GPUs that fit into their memory, fastest
    first. The batch size is not changed, and uneven stages are not tried.

    Raises UserError if none fits, or if none works at all.

    Args:
        gigabytes: memory of one GPU.
    """
    candidates = [
        _evaluate(candidate, settings, gpus, speed)
        for settings, candidate in _layouts(config, gpus)
    ]
    if not candidates:
        unsplit = next(_choices(config, gpus))
        check_layout(_with(config, unsplit), gpus)  # reports problems that no layout solves
        raise UserError(f"no layout works on {gpus} processes; give another number of GPUs")
    fitting = [one for one in candidates if one.memory.total <= gigabytes * GB]
    if not fitting:
        smallest = min(candidates, key=lambda one: one.memory.total)
        raise UserError(
            f"no layout on {gpus} GPUs fits in {gigabytes:g} GB: the smallest needs about "
            f"{smallest.memory.total / GB:.1f} GB per rank ({smallest.words or 'unchanged'}); give "
            "more GPUs or a smaller train.micro_batch_size"
        )
    best = min(one.time.total for one in fitting)

    def order(one: Suggestion) -> tuple[int, int, float]:
        return int(log(one.time.total / best, EQUAL_TIME_RATIO)), len(one.settings), one.time.total

    return sorted(fitting, key=order)


def _evaluate(config: Config, settings: Settings, gpus: int, speed: Speed) -> Suggestion:
    sharded = ShardedModel(config, check_layout(config, gpus))
    return Suggestion(settings, peak_rank(sharded), step_time(sharded, speed))


def _layouts(config: Config, gpus: int) -> Iterator[tuple[Settings, Config]]:
    """Yields the layouts that pass all checks, each as the keys that have to change and the changed
    config."""
    for settings in _choices(config, gpus):
        candidate = _with(config, settings)
        try:
            check_layout(candidate, gpus)
        except UserError:
            continue
        yield {k: v for k, v in settings.items() if v != attrgetter(k)(config)}, candidate


def _choices(config: Config, gpus: int) -> Iterator[Settings]:
    """Yields all layouts to check, each as the values of all its keys. The first splits nothing."""
    model = config.model
    tensors = [n for n in _powers(GPUS_PER_NODE) if gpus % n == 0]
    pipelines = [n for n in _divisors(model.num_layers) if gpus % n == 0]
    contexts = [n for n in _powers(LARGEST_CONTEXT) if gpus % n == 0]
    for tensor, pipeline, context in product(tensors, pipelines, contexts):
        if gpus % (tensor * pipeline * context):
            continue
        chunks = [None] if pipeline == 1 else [None, *_divisors(model.num_layers // pipeline)[1:]]
        for virtual, (expert, width), recompute in product(
            chunks, _expert_splits(config, tensor, gpus // pipeline), RECOMPUTE
        ):
            yield {
                "parallel.tensor": tensor,
                "parallel.pipeline": pipeline,
                "parallel.virtual_pipeline": virtual,
                "parallel.context": context,
                "parallel.expert": expert,
                "parallel.expert_tensor": width,
                **NOT_VARIED,
                "train.recompute": recompute,
            }


def _expert_splits(config: Config, tensor: int, ranks: int) -> list[tuple[int, int | None]]:
    """Returns the possible pairs of parallel.expert and parallel.expert_tensor."""
    if config.model.num_experts is None:
        return [(1, None)]
    widths = [None] if tensor == 1 else [None, 1]
    return [
        (expert, width)
        for expert in _divisors(config.model.num_experts)
        for width in widths
        if ranks % (expert * (width or tensor)) == 0
    ]


def _with(config: Config, settings: Settings) -> Config:
    """Returns the config with another layout."""
    sections: dict[str, Settings] = {"parallel": {}, "train": {}}
    for key, value in settings.items():
        section, name = key.split(".")
        sections[section][name] = value
    changed = {
        name: getattr(config, name).model_copy(update=update) for name, update in sections.items()
    }
    return config.model_copy(update=changed)


def _powers(largest: int) -> list[int]:
    return [2**n for n in range(largest.bit_length()) if 2**n <= largest]


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
