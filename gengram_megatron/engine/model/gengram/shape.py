"""The settings of `model.gengram` that decide a memory module."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import nn

from gengram_megatron.config.tables import KmerTable, Placement
from gengram_megatron.engine.model.gengram.pooling import Pooling
from gengram_megatron.engine.model.initialize import init_tag, torch_default


@dataclass(frozen=True)
class GengramShape:
    """See the schema of the config for what each means."""

    placements: tuple[Placement, ...]
    dim: int
    window: int | None
    conv_kernel: int
    init: Literal["published", "scaled"]
    init_std: float  # of the tables
    deduplicate: bool = False
    signed_sqrt: bool = True
    output: Literal["convolution", "norm", "plain"] = "convolution"
    project: Literal["features", "tables"] = "features"
    projection_bias: bool = False

    def init_method(self, config, fan_in: int) -> Callable[[nn.Parameter], nn.Parameter]:
        """Of a weight besides the tables and norms, with so many inputs to each output: torch's
        own where `init` is published, else megatron-core's config's."""
        if self.init == "published":
            return init_tag(torch_default(fan_in))
        return config.init_method

    @property
    def kmer_sizes(self) -> tuple[int, ...]:
        """Each k once, rising."""
        return tuple(sorted({place.table.k for place in self.placements}))

    @property
    def tables(self) -> tuple[KmerTable, ...]:
        """In the order of their placements."""
        return tuple(place.table for place in self.placements)

    @property
    def pooling(self) -> Pooling:
        """How the rows of a window become one."""
        return Pooling(self.window, self.deduplicate)
