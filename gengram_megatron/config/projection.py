"""Whether key and value are projected from the features of each token, or the tables are projected
once a step and looked up then (model/gengram/projected.py). Both give the same numbers."""

from typing import NamedTuple

from gengram_megatron.config.layout import Layout
from gengram_megatron.config.placement import SMALL_K
from gengram_megatron.config.problems.gengram import projection_obstacles
from gengram_megatron.config.schema import Config
from gengram_megatron.config.tables import ALPHABET_SIZE


class Projection(NamedTuple):
    """of: features or tables."""

    of: str
    reason: str


def projection(config: Config, layout: Layout, on_gpu: bool) -> Projection:
    """Of a config that check_layout accepts."""
    gengram = config.model.gengram
    if gengram.project != "auto":
        return Projection(gengram.project, f"gengram.project is {gengram.project}")
    if on_gpu:
        return Projection("features", "on GPUs the other way has not been measured")
    if max(gengram.kmer_sizes) > SMALL_K:
        return Projection("features", f"k is above {SMALL_K}")
    for obstacle, _ in projection_obstacles(config):
        return Projection("features", obstacle)
    tokens = layout.num_microbatches * config.train.micro_batch_size * config.model.seq_length
    tokens //= layout.context
    needed = break_even(max(gengram.kmer_sizes))
    found = f"{tokens:,} tokens a step and rank, and {needed:,} rows a table on average"
    return Projection("tables" if tokens > needed else "features", found)


def break_even(largest: int) -> int:
    """The tables' rows over their number: as many tokens' features cost as much to project."""
    return sum(ALPHABET_SIZE**k for k in range(1, largest + 1)) // largest


def bytes_held(config: Config) -> int:
    """Of a layer's projected tables and their gradient, in float32, on every rank."""
    gengram, largest = config.model.gengram, max(config.model.gengram.kmer_sizes)
    rows = sum(ALPHABET_SIZE**k for k in range(1, largest + 1))
    if gengram.window is not None and largest > 1:
        rows += ALPHABET_SIZE ** (largest - 1)  # what begins a window (model/gengram/folding.py)
    return 2 * 4 * rows * 2 * config.model.hidden_size
