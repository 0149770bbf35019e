"""The data sets of a run, as the training loop reads them."""

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations
from math import ceil
from pathlib import Path

from torch.utils.data import ConcatDataset

from gengram_megatron.config.keys import dotted
from gengram_megatron.config.layout import Layout
from gengram_megatron.config.schema import BlendPart, Config
from gengram_megatron.data_set import DataFile
from gengram_megatron.engine.data.batches import BatchStream
from gengram_megatron.engine.data.dataset import FragmentDataset
from gengram_megatron.engine.data.order import BlendOrder, SampleOrder
from gengram_megatron.errors import UserError
from gengram_megatron.tokenizer import DnaTokenizer

# Which samples stand for the validation split, where validation_samples takes a part of it, is
# the same in every run, so that runs of different seeds are scored on the same bases.
VALIDATION_SEED = 0
OFTEN = 2  # epochs; a set that is gone through more often is warned of


@dataclass(frozen=True)
class BuiltSet:
    """One data set of a run. `share`: of the run's samples; those of all sets add up to 1."""

    name: str
    share: Fraction
    train: FragmentDataset
    validation: FragmentDataset


@dataclass(frozen=True)
class Validation:
    """What is to be scored of one set, in so many steps."""

    name: str
    steps: int
    batches: BatchStream


class RunData:
    """Opens both splits of all sets; made before any process group, so that what is wrong with
    them is told in one sentence."""

    def __init__(self, config: Config):
        if config.data.tokenizer is not None:
            DnaTokenizer.check_sentencepiece(Path(config.data.tokenizer))
        self.config = config
        self.sets = _open_sets(config)
        sizes = [len(one.train) for one in self.sets]
        self._order = BlendOrder(sizes, [one.share for one in self.sets], config.run.seed)

    @property
    def facts(self) -> list[dict]:
        """What decides, with the seed, which sample stands at each position of the run."""
        return [{"sha256": one.train.sha256, "share": str(one.share)} for one in self.sets]

    @property
    def files(self) -> list[DataFile]:
        """All files that the run reads samples from."""
        splits = [split for one in self.sets for split in (one.train, one.validation)]
        return [file for split in splits for file in split.files]

    def statement(self, samples: int) -> list[str]:
        """How often a run of so many samples goes through each set, a line each, and a warning
        for each that it repeats more than once."""
        lines = []
        for one, count in zip(self.sets, self._order.counts(samples)):
            epochs, size = count / len(one.train), len(one.train)
            share = f"{float(one.share):.2%} of the samples, " if len(self.sets) > 1 else ""
            lines.append(f"data {one.name}: {share}{count:,} of {size:,}, {epochs:.3g} epochs")
            if epochs > OFTEN:
                lines.append(
                    f"warning: data {one.name} is read {epochs:.3g} times in this run; a larger "
                    "data set, a shorter run or a smaller weight repeats less"
                )
        return lines

    def training(self, layout: Layout, data_rank: int, consumed: int) -> BatchStream:
        """The steps from the sample at place `consumed` of the run on, without end. To be closed."""
        return BatchStream(
            ConcatDataset([one.train for one in self.sets]),
            self._order,
            consumed=consumed,
            total=None,
            workers=self.config.data.workers,
            **self._batches(layout, data_rank),
        )

    def validations(self, layout: Layout, data_rank: int) -> Iterator[Validation]:
        """One validation, set by set."""
        for one in self.sets:
            samples = self._validation_samples(one)
            batches = BatchStream(
                one.validation,
                SampleOrder(len(one.validation), VALIDATION_SEED),
                consumed=0,
                total=samples,
                workers=0,
                **self._batches(layout, data_rank),
            )
            yield Validation(one.name, self._steps(samples), batches)

    @property
    def validation_steps(self) -> int:
        """Steps of one validation, over all sets."""
        return sum(self._steps(self._validation_samples(one)) for one in self.sets)

    def _validation_samples(self, one: BuiltSet) -> int:
        samples, limit = len(one.validation), self.config.train.validation_samples
        return samples if limit is None else min(samples, ceil(limit * one.share))

    def _steps(self, samples: int) -> int:
        return ceil(samples / self.config.train.global_batch_size)

    def in_all(self, losses: dict[str, float]) -> float:
        """The loss over all sets, nats a base: in the shares that training has of them, so it may
        be compared with the training loss. losses: of each set, by name."""
        return sum(float(one.share) * losses[one.name] for one in self.sets)

    def _batches(self, layout: Layout, data_rank: int) -> dict[str, int]:
        return {
            "global_batch_size": self.config.train.global_batch_size,
            "micro_batch_size": self.config.train.micro_batch_size,
            "data_rank": data_rank,
            "data_size": layout.data,
        }


def _open_sets(config: Config) -> list[BuiltSet]:
    """The sets of data.blend, or the one of data.path."""
    parts = (
        {"data.path": BlendPart(path=config.data.path, weight=1)}
        if config.data.path
        else {
            dotted(("data", "blend", number, "path")): part
            for number, part in enumerate(config.data.blend)
        }
    )
    # As they are written: 0.7 is seven tenths, not the binary fraction next to it.
    weights = [Fraction(str(part.weight)) for part in parts.values()]
    sets = [
        BuiltSet(
            part.label,
            weight / sum(weights),
            *(
                FragmentDataset(Path(part.path), split, config.model.seq_length, key)
                for split in ("train", "validation")
            ),
        )
        for (key, part), weight in zip(parts.items(), weights)
    ]
    for (one, first), (other, second) in combinations(zip(parts, sets), 2):
        if first.train.sha256 == second.train.sha256:
            raise UserError(
                f"{one} and {other} hold the same samples; give them once, with the sum of the "
                "weights"
            )
    return sets
