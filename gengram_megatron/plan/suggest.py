"""What should be thought about in a layout that works, and other layouts that fit.

Layouts are suggested the fastest first; of those about as fast, the one with the fewest changes.
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
from gengram_megatron.plan.time import GPUS_A_NODE, Speed, StepTime, stage_flops, step_time

GB = 1e9
LARGEST_IDLE = 0.15
LARGEST_UNEVENNESS = 1.1


def warnings(split: ShardedModel, memory: Memory, gigabytes: float) -> Iterator[str]:
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


def _pipeline(split: ShardedModel) -> Iterator[str]:
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


LARGEST_CONTEXT = 16
ALIKE = 1.05
"""Times within such a ratio count as equal, and the layout with fewer words comes first."""
RECOMPUTE = ("none", "selective", "full")
UNTRIED = {
    "parallel.sequence": None,
    "parallel.first_stage_layers": None,
    "parallel.last_stage_layers": None,
}
"""What every suggestion leaves open, whatever the config has."""


@dataclass(frozen=True)
class Suggestion:
    """A layout that was looked at."""

    settings: dict[str, int | str | None]
    """The keys of the config that have to change for it."""
    memory: Memory
    time: StepTime

    @property
    def words(self) -> str:
        """They and their values, as a command takes them."""
        return " ".join(f"{key}={inline_yaml(value)}" for key, value in self.settings.items())


def suggest(config: Config, gpus: int, gigabytes: float, speed: Speed) -> list[Suggestion]:
    """All layouts of a config on so many GPUs that fit in so many gigabytes each, the fastest
    first. The batch stays as it is; uneven stages are not tried.

    Raises UserError if none fits, or none works at all.
    """
    found = [_judge(tried, settings, gpus, speed) for settings, tried in _layouts(config, gpus)]
    if not found:
        unsplit = next(_choices(config, gpus))
        check_layout(_with(config, unsplit), gpus)  # says what cannot work even so
        raise UserError(f"no layout works on {gpus} processes; give another number of GPUs")
    fitting = [one for one in found if one.memory.total <= gigabytes * GB]
    if not fitting:
        least = min(found, key=lambda one: one.memory.total)
        raise UserError(
            f"no layout on {gpus} GPUs fits in {gigabytes:g} GB: the smallest needs about "
            f"{least.memory.total / GB:.1f} GB a rank ({least.words or 'as it is'}); give more GPUs or "
            "a smaller train.micro_batch_size"
        )
    best = min(one.time.total for one in fitting)

    def rank(one: Suggestion) -> tuple:
        return int(log(one.time.total / best, ALIKE)), len(one.settings), one.time.total

    return sorted(fitting, key=rank)


def _judge(config: Config, settings: dict, gpus: int, speed: Speed) -> Suggestion:
    split = ShardedModel(config, check_layout(config, gpus))
    return Suggestion(settings, peak_rank(split), step_time(split, speed))


def _layouts(config: Config, gpus: int) -> Iterator[tuple[dict, Config]]:
    """Those that the checks allow, with the keys that have to change for them."""
    for settings in _choices(config, gpus):
        tried = _with(config, settings)
        try:
            check_layout(tried, gpus)
        except UserError:
            continue
        yield {k: v for k, v in settings.items() if v != attrgetter(k)(config)}, tried


def _choices(config: Config, gpus: int) -> Iterator[dict]:
    """All keys of a layout; the first splits nothing. The checks judge them."""
    model = config.model
    tensors = [n for n in _powers(GPUS_A_NODE) if gpus % n == 0]
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
                **UNTRIED,
                "train.recompute": recompute,
            }


def _expert_splits(config: Config, tensor: int, ranks: int) -> list[tuple[int, int | None]]:
    """Pairs of parallel.expert and parallel.expert_tensor."""
    if config.model.num_experts is None:
        return [(1, None)]
    widths = [None] if tensor == 1 else [None, 1]
    return [
        (expert, width)
        for expert in _divisors(config.model.num_experts)
        for width in widths
        if ranks % (expert * (width or tensor)) == 0
    ]


def _with(config: Config, settings: dict) -> Config:
    """The config in another layout."""
    sections = {"parallel": {}, "train": {}}
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
