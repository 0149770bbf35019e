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
from gengram_megatron.engine.data.samples import BlendOrder, FragmentDataset, SampleOrder
from gengram_megatron.errors import UserError
from gengram_megatron.tokenizer import DnaTokenizer

# If validation_samples selects only a part of the validation split, the part is the same in every
# run, so that runs with different seeds are scored on the same bases.
VALIDATION_SEED = 0
MAX_EPOCHS = 2  # above this a run warns that it repeats a set too often


@dataclass(frozen=True)
class BuiltSet:
    """One data set of a run. `share` is its share of the run's samples; all shares add up to 1."""

    name: str
    share: Fraction
    train: FragmentDataset
    validation: FragmentDataset


@dataclass(frozen=True)
class Validation:
    """The validation of one set: its batches and the number of steps that they take."""

    name: str
    steps: int
    batches: BatchStream


class RunData:
    """Opens both splits of all sets. It is created before any process group, so that a problem with
    a set is reported in one sentence."""

    def __init__(self, config: Config):
        if config.data.tokenizer is not None:
            DnaTokenizer.check_sentencepiece(Path(config.data.tokenizer))
        self.config = config
        self.sets = _open_sets(config)
        sizes = [len(data_set.train) for data_set in self.sets]
        shares = [data_set.share for data_set in self.sets]
        self._order = BlendOrder(sizes, shares, config.run.seed)

    @property
    def facts(self) -> list[dict[str, str]]:
        """What determines, with the seed, which sample is at each position of the run: each set's
        checksum and share."""
        return [
            {"sha256": data_set.train.sha256, "share": str(data_set.share)}
            for data_set in self.sets
        ]

    @property
    def files(self) -> list[DataFile]:
        """All files that the run reads samples from."""
        splits = [
            split for data_set in self.sets for split in (data_set.train, data_set.validation)
        ]
        return [file for split in splits for file in split.files]

    def statement(self, samples: int) -> list[str]:
        """Returns a line for each set that says how often a run of this many samples goes through
        it, with a warning after each set that it reads more than MAX_EPOCHS times."""
        lines = []
        for data_set, count in zip(self.sets, self._order.counts(samples)):
            name, size = data_set.name, len(data_set.train)
            epochs = count / size
            share = f"{float(data_set.share):.2%} of the samples, " if len(self.sets) > 1 else ""
            lines.append(f"data {name}: {share}{count:,} of {size:,}, {epochs:.3g} epochs")
            if epochs > MAX_EPOCHS:
                lines.append(
                    f"warning: data {name} is read {epochs:.3g} times in this run; a larger data "
                    "set, a shorter run or a smaller weight repeats less"
                )
        return lines

    def training(self, layout: Layout, data_rank: int, consumed: int) -> BatchStream:
        """Returns an endless stream of steps, from the sample at position `consumed` of the run.
        The caller must close it."""
        return BatchStream(
            ConcatDataset([data_set.train for data_set in self.sets]),
            self._order,
            consumed=consumed,
            total=None,
            workers=self.config.data.workers,
            **self._batches(layout, data_rank),
        )

    def validations(self, layout: Layout, data_rank: int) -> Iterator[Validation]:
        """Yields the parts of one validation, set by set."""
        for data_set in self.sets:
            samples = self._validation_samples(data_set)
            batches = BatchStream(
                data_set.validation,
                SampleOrder(len(data_set.validation), VALIDATION_SEED),
                consumed=0,
                total=samples,
                workers=0,
                **self._batches(layout, data_rank),
            )
            yield Validation(data_set.name, self._steps(samples), batches)

    @property
    def validation_steps(self) -> int:
        """The number of steps of one validation, over all sets."""
        return sum(self._steps(self._validation_samples(data_set)) for data_set in self.sets)

    def _validation_samples(self, data_set: BuiltSet) -> int:
        samples, limit = len(data_set.validation), self.config.train.validation_samples
        return samples if limit is None else min(samples, ceil(limit * data_set.share))

    def _steps(self, samples: int) -> int:
        return ceil(samples / self.config.train.global_batch_size)

    def in_all(self, losses: dict[str, float]) -> float:
        """Returns the loss over all sets in nats per base, weighted by the sets' shares of the
        training samples, so that it can be compared with the training loss.

        losses: the loss of each set, by name.
        """
        return sum(float(data_set.share) * losses[data_set.name] for data_set in self.sets)

    def _batches(self, layout: Layout, data_rank: int) -> dict[str, int]:
        return {
            "global_batch_size": self.config.train.global_batch_size,
            "micro_batch_size": self.config.train.micro_batch_size,
            "data_rank": data_rank,
            "data_size": layout.data,
        }


def _open_sets(config: Config) -> list[BuiltSet]:
    """Opens the sets of data.blend, or the one of data.path."""
    parts = (
        {"data.path": BlendPart(path=config.data.path, weight=1)}
        if config.data.path
        else {
            dotted(("data", "blend", number, "path")): part
            for number, part in enumerate(config.data.blend or [])
        }
    )
    # Exact decimals: 0.7 is seven tenths, not the nearest binary fraction.
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
    for (key, data_set), (other_key, other) in combinations(zip(parts, sets), 2):
        if data_set.train.sha256 == other.train.sha256:
            raise UserError(
                f"{key} and {other_key} hold the same samples; give them once, with the sum of the "
                "weights"
            )
    return sets
