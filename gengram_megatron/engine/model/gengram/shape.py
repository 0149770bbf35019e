"""The settings of `model.gengram` that determine a memory module."""

from dataclasses import dataclass
from typing import Literal

from megatron.core.transformer.transformer_config import TransformerConfig

from gengram_megatron.config.tables import KmerTable, Placement
from gengram_megatron.engine.model.gengram.pooling import Pooling
from gengram_megatron.engine.model.initialize import InitMethod, init_tag, torch_default


@dataclass(frozen=True)
class GengramShape:
    """The settings; the schema of the config says what each means."""

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

    def init_method(self, config: TransformerConfig, fan_in: int) -> InitMethod:
        """Returns the init method of a weight other than tables and norms: torch's default if
        `init` is published, else that of megatron-core's config. fan_in: the inputs to each
        output."""
        if self.init == "published":
            return init_tag(torch_default(fan_in))
        init_method: InitMethod = config.init_method
        return init_method

    @property
    def kmer_sizes(self) -> tuple[int, ...]:
        """Each k once, in ascending order."""
        return tuple(sorted({placement.table.k for placement in self.placements}))

    @property
    def tables(self) -> tuple[KmerTable, ...]:
        """The tables, in the order of their placements."""
        return tuple(placement.table for placement in self.placements)

    @property
    def pooling(self) -> Pooling:
        """How the rows of a window are pooled."""
        return Pooling(self.window, self.deduplicate)
