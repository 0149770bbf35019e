"""The settings of `model.gengram` that decide a memory module."""

from dataclasses import dataclass
from typing import Literal

from gengram_megatron.model.gengram.pooling import Pooling


@dataclass(frozen=True)
class GengramShape:
    """See the schema of the config for what each means."""

    kmer_sizes: tuple[int, ...]
    dim: int
    window: int | None
    conv_kernel: int
    init_std: float
    deduplicate: bool = False
    signed_sqrt: bool = True
    output: Literal["convolution", "norm", "plain"] = "convolution"
    split: Literal["columns", "rows"] = "columns"

    @property
    def pooling(self) -> Pooling:
        """How the rows of a window become one."""
        return Pooling(self.window, self.deduplicate)
