"""Builds a data set; the steps stand here in the order in which they happen.

Every source is read twice: first to lay its grid and to count, then, when the fate of each fragment
is known, to write. After the first reading the location of each fragment in the data set is known,
so sources can be written in any order and by any process, each to its own location.
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
from data_prep.work import BuildDirectory, open_build_directory
from data_prep.workers import Advance, IncrementalSha256, Workers
from data_prep.write import (
    INDEX_BYTES,
    ORIGIN,
    SPLITS,
    SourcePlan,
    prepare_split,
    tokens_path,
    write_records,
    write_source,
)
from gengram_megatron.data_set import MANIFEST
from gengram_megatron.errors import UserError

Say = Callable[[str], None]
"""A callback that gets a sentence for the user."""


def build(
    config: DataConfig,
    config_folder: Path,
    overwrite: bool,
    report: Report,
    say: Say = lambda text: None,
) -> dict[str, Any] | None:
    """Builds the data set.

    Args:
        config: what to build.
        config_folder: the folder of the config file, from which its paths are relative.
        overwrite: replace an existing data set that has other settings or sources.
        report: is told about progress.
        say: gets sentences about what the user should know.

    Returns the manifest, or None if the data set exists and is up to date.
    """
    output = Path(config.output).absolute()
    sources = inputs(config, config_folder)
    with Workers(_worker_count(config, len(sources))) as workers:
        is_up_to_date = partial(_is_up_to_date, output, config, sources, overwrite, workers, report)
        if is_up_to_date():
            return None
        with open_build_directory(output) as work:
            if is_up_to_date():  # after an interrupted replacement, the old data set is back
                return None
            surveys = _survey(sources, config, work, workers, report, say)
            _check_duplicates(surveys)
            _say_what_was_missing(sources, surveys, config, say)
            fates = _mix(sources, surveys, config, say)
            checksums = _write(sources, surveys, fates, config, work, workers, report, say)
            counts = _counts(sources, surveys, fates, config)
            written = manifest.write_manifest(work.data, config, *counts, checksums)
            work.publish(replace=overwrite)
            return written


def _worker_count(config: DataConfig, sources: int) -> int:
    return min(config.workers or len(os.sched_getaffinity(0)), sources)


def _is_up_to_date(
    output: Path,
    config: DataConfig,
    sources: list[Input],
    overwrite: bool,
    workers: Workers,
    report: Report,
) -> bool:
    """Returns whether the output exists and is up to date; with `overwrite`, no output counts as
    such.

    Raises UserError if the output is not a data set, or is a different one and may not be
    overwritten.
    """
    if not output.exists():
        return False
    if not (output / MANIFEST).is_file():
        raise UserError(f"{output} exists and is not a data set; give another output")
    if overwrite:
        return False
    difference = manifest.difference(output, config, partial(_checksums, sources, workers, report))
    if difference is None:
        return True
    raise UserError(f"{output} {difference}; give another output, or --overwrite to replace it")


def _checksums(
    sources: list[Input], workers: Workers, report: Report
) -> dict[str, dict[str, dict[str, Any]]]:
    """Returns sizes and checksums of the files of all sources, by group/name."""
    size = sum(path.stat().st_size for source in sources for path in source.files.values())
    phase = Phase("checking the sources", size, "bytes")
    results = workers.run(_facts, sources, partial(report, phase))
    return {source.key: facts for source, facts in results}


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
    """Does the first reading: surveys the sources that no earlier start has read.

    The largest come first, so that no worker is still busy with a large one at the end.
    """
    settings = config.model_dump(mode="json", include=set(SURVEYED))
    surveys: dict[str, Survey] = {}
    for source in sources:
        if kept := work.survey_of(source, settings):
            surveys[source.key] = kept
    remaining = [source for source in sources if source.key not in surveys]
    if len(remaining) < len(sources):
        say(
            f"resuming from {work.folder}: {len(sources) - len(remaining)} of {len(sources)} "
            "sources were surveyed"
        )
    remaining.sort(key=lambda source: source.path.stat().st_size, reverse=True)
    survey_source = partial(_survey_source, config=config, work=work, settings=settings)
    size = sum(source.path.stat().st_size for source in remaining)
    phase = Phase("surveying", size, "bytes")
    for source, _ in workers.run(survey_source, remaining, partial(report, phase)):
        if not (kept := work.survey_of(source, settings)):
            raise changed(source.path)
        surveys[source.key] = kept
    return {source.key: surveys[source.key] for source in sources}


def _survey_source(
    source: Input, advance: Advance, config: DataConfig, work: BuildDirectory, settings: Any
) -> None:
    """Surveys a source and stores the result in the build directory.

    It is not returned: a worker that is killed while it sends more than the few bytes of one write
    would leave the first process waiting for the rest.
    """
    work.keep_survey(source, settings, survey(source, advance, config))


SURVEYED = ("seq_length", "max_n_fraction", "validation", "validation_blocks", "gene_distance")
"""The keys of the data set that a survey depends on, besides those of the source."""


def _check_duplicates(surveys: dict[str, Survey]) -> None:
    """Raises UserError if two sources are the same file."""
    keys_by_checksum: dict[str, str] = {}
    for key, source_survey in surveys.items():
        first = keys_by_checksum.setdefault(source_survey.facts["sha256"], key)
        if first != key:
            raise UserError(f"sources {first} and {key} are the same file, byte for byte")


def _say_what_was_missing(
    sources: list[Input], surveys: dict[str, Survey], config: DataConfig, say: Say
) -> None:
    """Names the sources to which a rule of the config cannot apply because something is missing,
    the data that was ignored, and the features that count as genes without being called so."""
    for source in sources:
        for key, count in surveys[source.key].facts.get("bytes_after_compressed_data", {}).items():
            say(
                f"{source.files[key]} has {count:,} bytes after its compressed data; they are not "
                f"part of it and were ignored, as gunzip does (source {source.key})"
            )
    without = [it.key for it in sources if "without_annotation" in surveys[it.key].facts["genes"]]
    if without:
        say(f"without annotation, so that gene_distance cannot apply: {', '.join(without)}")
    for sentence in notes({key: it.facts["genes"] for key, it in surveys.items()}):
        say(sentence)
    whole = [
        source.key
        for source in sources
        if source.settings.validation_headers and not surveys[source.key].facts["held_out_bases"]
    ]
    if whole:
        say(f"no header matches validation_headers, so nothing is held out: {', '.join(whole)}")


def _mix(
    sources: list[Input], surveys: dict[str, Survey], config: DataConfig, say: Say
) -> dict[str, np.ndarray]:
    """Balances the groups; returns the fates of each source's fragments after that, by
    group/name."""
    groups = {
        group: np.concatenate([surveys[it.key].fates for it in sources if it.group == group])
        for group in config.groups
    }
    weights = {
        name: group.weight for name, group in config.groups.items() if group.weight != "size"
    } or None
    tokens, total = config.seq_length + 1, config.total_tokens
    shortage = mix.balance(groups, weights, config.seed, tokens, total, config.allow_fewer)
    if shortage:
        say(f"{shortage}; all that they hold is used")
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
    """Does the second reading: writes the fragments of each source to their location, which follows
    the order of the sources. Returns sizes and checksums of the token files, by name."""
    plans = _source_plans(sources, surveys, fates)
    counts = {
        split: sum(int(np.count_nonzero(fate == kept)) for fate in fates.values())
        for split, kept in SPLITS.items()
    }
    identity = [manifest.settings_of(config), [surveys[source.key].facts for source in sources]]
    work.prepare_data(identity, partial(_prepare, counts=counts, config=config))
    remaining = [plan for plan in plans if not work.is_written(plan.source)]
    if len(remaining) < len(plans):
        say(f"{len(plans) - len(remaining)} of {len(plans)} sources were written")
    remaining.sort(key=lambda plan: len(plan.fates), reverse=True)
    write = partial(write_source, folder=work.data, config=config)
    with _hashed_while_written(plans, counts, work.data, config.seq_length + 1) as files:
        for plan in plans:
            if work.is_written(plan.source):
                _mark_written(files, plan)
        bases = sum(int(plan.survey.lengths.sum()) for plan in remaining)
        phase = Phase("writing", bases, "bases")
        for plan, _ in workers.run(write, remaining, partial(report, phase)):
            work.mark_written(plan.source)
            _mark_written(files, plan)
        _write_records(sources, surveys, work.data)
        hashed = [file.hashed for file in files]
        unhashed = sum(file.path.stat().st_size for file in files) - sum(hashed)
        advance = partial(report, Phase("computing checksums", unhashed, "bytes"))
        return {file.path.name: file.facts(advance, done) for file, done in zip(files, hashed)}


@contextmanager
def _hashed_while_written(
    plans: list[SourcePlan], counts: dict[str, int], folder: Path, tokens: int
) -> Iterator[list[IncrementalSha256]]:
    """Opens the token file of each split to be hashed while the sources are written to it.

    Args:
        plans: the plans of all sources, in order.
        counts: the number of documents of each split.
        folder: the folder of the files.
        tokens: the number of tokens of a document.
    """
    with ExitStack() as stack:
        files = []
        for split, count in counts.items():
            firsts = [*(plan.first[split] for plan in plans), count]
            ends = [first * tokens for first in firsts[1:]]
            files.append(stack.enter_context(IncrementalSha256(tokens_path(folder, split), ends)))
        yield files


def _mark_written(files: list[IncrementalSha256], plan: SourcePlan) -> None:
    """Tells the files that a source is written."""
    for file in files:
        file.written(plan.index)


def _write_records(sources: list[Input], surveys: dict[str, Survey], folder: Path) -> None:
    """Writes records.tsv."""
    rows = [
        (source.key, name, length)
        for source in sources
        for name, length in zip(surveys[source.key].names, surveys[source.key].lengths.tolist())
    ]
    write_records(folder, rows)


def _source_plans(
    sources: list[Input], surveys: dict[str, Survey], fates: dict[str, np.ndarray]
) -> list[SourcePlan]:
    """Returns what each source adds to the data set, and where."""
    plans, row, first = [], 0, dict.fromkeys(SPLITS, 0)
    for index, source in enumerate(sources):
        source_survey, fate = surveys[source.key], fates[source.key]
        plans.append(SourcePlan(index, source, source_survey, fate, row, dict(first)))
        row += len(source_survey.names)
        for split, kept in SPLITS.items():
            first[split] += int(np.count_nonzero(fate == kept))
    return plans


def _prepare(folder: Path, counts: dict[str, int], config: DataConfig) -> None:
    """Creates the data set's files in their full size. Raises UserError if the disk is too
    small."""
    tokens = config.seq_length + 1
    needed = sum(counts.values()) * (tokens + ORIGIN.itemsize + INDEX_BYTES)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{Path(config.output).absolute()} will take {decimal(needed)} and its disk has "
            f"{decimal(free)} of free space; make room, give another output, or set total_tokens"
        )
    for split, count in counts.items():
        prepare_split(folder, split, count, tokens)


def _counts(
    sources: list[Input],
    surveys: dict[str, Survey],
    fates: dict[str, np.ndarray],
    config: DataConfig,
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, int]], dict[str, dict[str, int]]]:
    """Returns what the manifest says of sources, groups and splits, each by name."""
    by_source: dict[str, dict[str, Any]] = {}
    by_group: dict[str, dict[str, int]] = {group: {} for group in config.groups}
    for source in sources:
        source_survey = surveys[source.key]
        counts = _source_counts(source_survey, fates[source.key], config.seq_length)
        facts = {"fasta": source.settings.fasta, **source_survey.facts}
        by_source[source.key] = {**facts, **counts}
        sums = by_group[source.group]
        sums.update({name: sums.get(name, 0) + count for name, count in counts.items()})
    by_split = {
        name: {
            "fragments": sum(group[name] for group in by_group.values()),
            "tokens": sum(group[f"{name}_tokens"] for group in by_group.values()),
        }
        for name in SPLITS
    }
    return by_source, by_group, by_split


def _source_counts(source_survey: Survey, fates: np.ndarray, seq_length: int) -> dict[str, int]:
    bases = int(source_survey.lengths.sum())
    by_fate = np.bincount(fates, minlength=len(Fate)).tolist()
    return {
        "records": len(source_survey.names),
        "bases": bases,
        "remainder_bases": bases - len(fates) * seq_length,
        "fragments": len(fates),
        **{fate.name.lower(): by_fate[fate] for fate in Fate},
        **{f"{split}_tokens": by_fate[fate] * (seq_length + 1) for split, fate in SPLITS.items()},
    }
