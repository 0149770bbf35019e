"""The two splits of a run's data set, as the training loop reads them."""

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from gengram_megatron.config.layout import Layout
from gengram_megatron.config.schema import Config
from gengram_megatron.data.batches import microbatches
from gengram_megatron.data.dataset import FragmentDataset
from gengram_megatron.data.order import SampleOrder
from gengram_megatron.tokenizer import DnaTokenizer

# Which samples stand for the validation split, where validation_samples takes a part of it, is
# the same in every run, so that runs of different seeds are scored on the same bases.
VALIDATION_SEED = 0


class RunData:
    """Opens both splits; made before any process group, so that a missing data set is told in
    one sentence."""

    def __init__(self, config: Config):
        if config.data.tokenizer is not None:
            DnaTokenizer.check_sentencepiece(Path(config.data.tokenizer))
        folder, length = Path(config.data.path), config.model.seq_length
        self.train_split = FragmentDataset(folder, "train", length)
        self.validation_split = FragmentDataset(folder, "validation", length)
        self.config = config

    @property
    def validation_samples(self) -> int:
        """Samples that each validation scores."""
        there = len(self.validation_split)
        return min(self.config.train.validation_samples or there, there)

    def training(self, layout: Layout, data_rank: int, consumed: int) -> Iterator[Tensor]:
        """Microbatches from the sample at place `consumed` of the run on, without end."""
        return microbatches(
            self.train_split,
            SampleOrder(len(self.train_split), self.config.run.seed),
            consumed=consumed,
            total=None,
            workers=self.config.data.workers,
            **self._batches(layout, data_rank),
        )

    def validation(self, layout: Layout, data_rank: int) -> Iterator[Tensor]:
        """The microbatches of one validation."""
        return microbatches(
            self.validation_split,
            SampleOrder(len(self.validation_split), VALIDATION_SEED),
            consumed=0,
            total=self.validation_samples,
            workers=0,
            **self._batches(layout, data_rank),
        )

    def _batches(self, layout: Layout, data_rank: int) -> dict[str, int]:
        return {
            "global_batch_size": self.config.train.global_batch_size,
            "micro_batch_size": self.config.train.micro_batch_size,
            "data_rank": data_rank,
            "data_size": layout.data,
        }
