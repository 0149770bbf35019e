"""A whole build, in the order in which it happens.

Every source is read twice: once to lay its grid and count, then, when the fate of each fragment
is known, to write. Between the two the place of each fragment in the data set is known, so each
source is written to its own place, in any order and by any process.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.filesize import decimal

from data_prep import manifest, mix
from data_prep.fragment import Fate
from data_prep.genes import notes
from data_prep.progress import Phase, Report
from data_prep.schema import DataConfig
from data_prep.sources import Input, inputs
from data_prep.survey import Survey, changed, survey
from data_prep.work import BuildDirectory, work_on
from data_prep.workers import Advance, IncrementalSha256, Workers
from data_prep.write import (
    INDEX_BYTES,
    ORIGIN,
    SPLITS,
    Part,
    prepare_split,
    tokens_path,
    write_part,
    write_records,
)
from gengram_megatron.errors import UserError

Say = Callable[[str], None]
"""Is told, in a sentence, what the user should know."""


def build(
    config: DataConfig,
    config_folder: Path,
    overwrite: bool,
    report: Report,
    say: Say = lambda text: None,
) -> dict[str, Any] | None:
    """Build the data set and return its manifest; None if it is there and up to date."""
    output = Path(config.output).absolute()
    sources = inputs(config, config_folder)
    with Workers(_worker_count(config, len(sources))) as workers:
        keep = partial(_keep, output, config, sources, overwrite, workers, report)
        if keep():
            return None
        with work_on(output) as work:
            if keep():  # where an earlier replacement was cut off, the old data set is back
                return None
            surveys = _survey(sources, config, work, workers, report, say)
            _check_twins(surveys)
            _say_what_was_missing(sources, surveys, config, say)
            fates = _mix(sources, surveys, config, say)
            known = _write(sources, surveys, fates, config, work, workers, report, say)
            counts = _counts(sources, surveys, fates, config)
            found = manifest.write_manifest(work.data, config, *counts, known)
            work.publish(replace=overwrite)
            return found


def _worker_count(config: DataConfig, sources: int) -> int:
    return min(config.workers or len(os.sched_getaffinity(0)), sources)


def _keep(
    output: Path,
    config: DataConfig,
    sources: list[Input],
    overwrite: bool,
    workers: Workers,
    report: Report,
) -> bool:
    """Whether there is an output that is to stay. Refuses where that is not for us to decide."""
    if not output.exists():
        return False
    if not (output / manifest.MANIFEST).is_file():
        raise UserError(f"{output} exists and is not a data set; give another output")
    if overwrite:
        return False
    how = manifest.difference(output, config, partial(_checksums, sources, workers, report))
    if how is None:
        return True
    raise UserError(f"{output} {how}; give another output, or --overwrite to replace it")


def _checksums(
    sources: list[Input], workers: Workers, report: Report
) -> dict[str, dict[str, dict[str, Any]]]:
    """Sizes and checksums of the files of all sources."""
    size = sum(path.stat().st_size for source in sources for path in source.files.values())
    phase = Phase("checking the sources", size, "bytes")
    found = workers.run(_facts, sources, partial(report, phase))
    return {source.key: facts for source, facts in found}


def _facts(source: Input, advance: Advance) -> dict[str, Any]:
    facts = {}
    for kind, path in source.files.items():
        facts[kind] = manifest.file_facts(path)
        advance(facts[kind]["bytes"])
    return {**facts.pop("fasta"), **facts}


def _survey(
    sources: list[Input],
    config: DataConfig,
    work: BuildDirectory,
    workers: Workers,
    report: Report,
    say: Say,
) -> dict[str, Survey]:
    """First reading, of the sources that no earlier start has read: the largest come first, so
    that no worker is left with one at the end."""
    settings = config.model_dump(mode="json", include=set(SURVEYED))
    surveys = {source.key: work.survey_of(source, settings) for source in sources}
    left = [source for source in sources if surveys[source.key] is None]
    if len(left) < len(sources):
        say(
            f"going on from {work.folder}: {len(sources) - len(left)} of {len(sources)} sources "
            "were looked over"
        )
    left.sort(key=lambda source: source.path.stat().st_size, reverse=True)
    look_over = partial(_look_over, config=config, work=work, settings=settings)
    size = sum(source.path.stat().st_size for source in left)
    phase = Phase("looking over", size, "bytes")
    for source, _ in workers.run(look_over, left, partial(report, phase)):
        surveys[source.key] = work.survey_of(source, settings)
        if surveys[source.key] is None:
            raise changed(source.path)
    return surveys


def _look_over(
    source: Input, advance: Advance, config: DataConfig, work: BuildDirectory, settings: Any
) -> None:
    """Survey a source and keep what is found. It is not returned, as a worker that is killed while
    it sends more than the few bytes of one write leaves the first process waiting for the rest."""
    work.keep_survey(source, settings, survey(source, advance, config))


SURVEYED = ("seq_length", "max_n_fraction", "validation", "validation_blocks", "gene_distance")
"""The keys of the data set, beside those of the source, that a survey hangs on."""


def _check_twins(surveys: dict[str, Survey]) -> None:
    known: dict[str, str] = {}
    for key, found in surveys.items():
        twin = known.setdefault(found.facts["sha256"], key)
        if twin != key:
            raise UserError(f"sources {twin} and {key} are the same file, byte for byte")


def _say_what_was_missing(
    sources: list[Input], surveys: dict[str, Survey], config: DataConfig, say: Say
) -> None:
    """Name the sources to which a rule of the config does not apply, for lack of what it needs, and
    what was left unread or read in place of something else."""
    for source in sources:
        for key, count in surveys[source.key].facts.get("bytes_after_compressed_data", {}).items():
            say(
                f"{source.files[key]} goes on for {count:,} bytes after its compressed data; they "
                f"are no part of it and were ignored, as gunzip does (source {source.key})"
            )
    without = [it.key for it in sources if "without_annotation" in surveys[it.key].facts["genes"]]
    if without:
        say(f"without annotation, so that gene_distance cannot apply: {', '.join(without)}")
    for sentence in notes({key: found.facts["genes"] for key, found in surveys.items()}):
        say(sentence)
    whole = [
        source.key
        for source in sources
        if source.settings.validation_headers and not surveys[source.key].facts["held_out_bases"]
    ]
    if whole:
        say(f"no header is like validation_headers, so nothing is held out: {', '.join(whole)}")


def _mix(
    sources: list[Input], surveys: dict[str, Survey], config: DataConfig, say: Say
) -> dict[str, np.ndarray]:
    """The fates of each source's fragments once the groups are balanced."""
    groups = {
        group: np.concatenate([surveys[it.key].fates for it in sources if it.group == group])
        for group in config.groups
    }
    weights = {name: group.weight for name, group in config.groups.items()}
    tokens, total = config.seq_length + 1, config.total_tokens
    fewer = mix.balance(groups, weights, config.seed, tokens, total, config.allow_fewer)
    if fewer:
        say(f"{fewer}; all that there are is taken")
    if loss := mix.loss_by_weights(groups, weights, tokens):
        say(loss)
    fates = {}
    for source in sources:
        count = len(surveys[source.key].fates)
        fates[source.key], groups[source.group] = np.split(groups[source.group], [count])
    return fates


def _write(
    sources: list[Input],
    surveys: dict[str, Survey],
    fates: dict[str, np.ndarray],
    config: DataConfig,
    work: BuildDirectory,
    workers: Workers,
    report: Report,
    say: Say,
) -> dict[str, dict[str, Any]]:
    """Second reading: the fragments of each source go to their place, in the order of the
    sources. Returns sizes and checksums of the largest files."""
    parts = _parts(sources, surveys, fates)
    counts = {
        split: sum(int(np.count_nonzero(fate == kept)) for fate in fates.values())
        for split, kept in SPLITS.items()
    }
    plan = [manifest.settings_of(config), [surveys[source.key].facts for source in sources]]
    work.prepare_data(plan, partial(_prepare, counts=counts, config=config))
    left = [part for part in parts if not work.is_written(part.source)]
    if len(left) < len(parts):
        say(f"{len(parts) - len(left)} of {len(parts)} sources were written")
    left.sort(key=lambda part: len(part.fates), reverse=True)
    write = partial(write_part, folder=work.data, config=config)
    with _following(parts, counts, work.data, config.seq_length + 1) as files:
        for part in parts:
            if work.is_written(part.source):
                _tell(files, part)
        bases = sum(int(part.survey.lengths.sum()) for part in left)
        phase = Phase("writing", bases, "bases")
        for part, _ in workers.run(write, left, partial(report, phase)):
            work.mark_written(part.source)
            _tell(files, part)
        _write_records(sources, surveys, work.data)
        hashed = [file.hashed for file in files]
        rest = sum(file.path.stat().st_size for file in files) - sum(hashed)
        hashing = partial(report, Phase("computing checksums", rest, "bytes"))
        return {file.path.name: file.facts(hashing, told) for file, told in zip(files, hashed)}


@contextmanager
def _following(
    parts: list[Part], counts: dict[str, int], folder: Path, tokens: int
) -> Iterator[list[IncrementalSha256]]:
    """The files with the documents of the splits, each of so many tokens."""
    with ExitStack() as stack:
        files = []
        for split, count in counts.items():
            firsts = [*(part.first[split] for part in parts), count]
            ends = [first * tokens for first in firsts[1:]]
            files.append(stack.enter_context(IncrementalSha256(tokens_path(folder, split), ends)))
        yield files


def _tell(files: list[IncrementalSha256], part: Part) -> None:
    """Say that a part is written."""
    for file in files:
        file.written(part.number)


def _write_records(sources: list[Input], surveys: dict[str, Survey], folder: Path) -> None:
    """Write records.tsv."""
    rows = [
        (source.key, name, length)
        for source in sources
        for name, length in zip(surveys[source.key].names, surveys[source.key].lengths.tolist())
    ]
    write_records(folder, rows)


def _parts(
    sources: list[Input], surveys: dict[str, Survey], fates: dict[str, np.ndarray]
) -> list[Part]:
    """What each source adds to the data set, and where."""
    parts, row, first = [], 0, dict.fromkeys(SPLITS, 0)
    for number, source in enumerate(sources):
        found, fate = surveys[source.key], fates[source.key]
        parts.append(Part(number, source, found, fate, row, dict(first)))
        row += len(found.names)
        for split, kept in SPLITS.items():
            first[split] += int(np.count_nonzero(fate == kept))
    return parts


def _prepare(folder: Path, counts: dict[str, int], config: DataConfig) -> None:
    """Make the data set's files in their full size, if the disk has room for them."""
    tokens = config.seq_length + 1
    needed = sum(counts.values()) * (tokens + ORIGIN.itemsize + INDEX_BYTES)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{Path(config.output).absolute()} will take {decimal(needed)} and its disk has {decimal(free)} of "
            "free space; make room, give another output, or set total_tokens"
        )
    for split, count in counts.items():
        prepare_split(folder, split, count, tokens)


def _counts(
    sources: list[Input],
    surveys: dict[str, Survey],
    fates: dict[str, np.ndarray],
    config: DataConfig,
) -> tuple[dict[str, dict], dict[str, dict], dict[str, dict]]:
    """What the manifest says of sources, groups and splits."""
    of_source, of_group = {}, {group: {} for group in config.groups}
    for source in sources:
        found = surveys[source.key]
        counts = _source_counts(found, fates[source.key], config.seq_length)
        facts = {"fasta": source.settings.fasta, **found.facts}
        of_source[source.key] = {**facts, **counts}
        sums = of_group[source.group]
        sums.update({name: sums.get(name, 0) + count for name, count in counts.items()})
    of_split = {
        name: {
            "fragments": sum(group[name] for group in of_group.values()),
            "tokens": sum(group[f"{name}_tokens"] for group in of_group.values()),
        }
        for name in SPLITS
    }
    return of_source, of_group, of_split


def _source_counts(found: Survey, fates: np.ndarray, seq_length: int) -> dict[str, int]:
    bases = int(found.lengths.sum())
    kept = np.bincount(fates, minlength=len(Fate)).tolist()
    return {
        "records": len(found.names),
        "bases": bases,
        "remainder_bases": bases - len(fates) * seq_length,
        "fragments": len(fates),
        **{fate.name.lower(): kept[fate] for fate in Fate},
        **{f"{split}_tokens": kept[fate] * (seq_length + 1) for split, fate in SPLITS.items()},
    }
