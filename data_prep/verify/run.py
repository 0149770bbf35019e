"""All checks of a data set, in an order in which none trips over what an earlier one found."""

from collections.abc import Iterator
from pathlib import Path

from data_prep.inspect.opened import DataSet
from data_prep.origins import RECORDS, origins_path
from data_prep.progress import Report
from data_prep.verify.counts import check_counts, check_sequences
from data_prep.verify.files import check_files
from data_prep.verify.index import check_index
from data_prep.verify.places import check_places
from data_prep.verify.sources import Ordered, check_source
from gengram_megatron.errors import UserError


def problems(data: DataSet, sources: dict[str, Path], report: Report) -> Iterator[str]:
    """Everything that is wrong with a data set, a sentence each. `sources` are the FASTA files to
    compare it with, if any."""
    yield from check_counts(data)
    yield from check_files(data, report)
    for name, facts in data.facts.splits.items():
        path = data.folder / f"{name}.idx"
        if path.is_file():
            yield from check_index(path, facts.fragments, data.seq_length)
    places = [*_check_places(data)]
    yield from places
    if not sources:
        return
    if places or len(splits := _whole_splits(data)) < len(data.facts.splits):
        yield "the bases were not compared with the sources, because not all origins can be trusted"
        return
    ordered = {name: Ordered.of(data, data.split(name)) for name in splits}
    for key, path in sources.items():
        yield from check_source(data, key, path, ordered, report)


def _check_places(data: DataSet) -> Iterator[str]:
    """Problems of sequences and origins, as far as their files are whole."""
    if data.fault(RECORDS):
        return
    try:
        yield from check_sequences(data)
        yield from check_places(data, {name: data.split(name) for name in _whole_splits(data)})
    except UserError as error:
        yield str(error)


def _whole_splits(data: DataSet) -> list[str]:
    """The splits that can be looked into; of the others it was said why not."""
    if data.fault(RECORDS):
        return []  # without the names of the sequences no origin means anything
    return [
        name
        for name in data.facts.splits
        if not data.fault(f"{name}.bin") and not data.fault(origins_path(data.folder, name).name)
    ]
