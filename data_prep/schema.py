"""Every key of a data config: its name, type, default and meaning."""

import re
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator

from gengram_megatron.config.keys import Fraction, NonNegative, Positive, Section

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]
SourceName = Annotated[str, Field(pattern=r"^([A-Za-z0-9_-]+|\*)$")]
Words = Annotated[str, Field(min_length=1)]


def _regex(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"this is no regular expression: {error}") from None
    return text


Regex = Annotated[str, Field(min_length=1), AfterValidator(_regex)]
Share = Annotated[float, Field(ge=0, lt=1)]


class Source(Section):
    """One FASTA file, or many, and what is held out for validation."""

    fasta: str = Field(
        min_length=1,
        description="plain, gzip, bgzip, bzip2, xz or zstd; relative to the file that names it. "
        "A * in its name stands for any text: of one file, or if the source is called *, of many, "
        "each a source named by that text",
    )
    only: list[Words] | None = Field(
        None,
        min_length=1,
        description="of the files that fasta stands for, those whose text for the * begins so",
    )
    validation: Share | None = Field(
        None, description="share of the fragments held out; null: the data set's"
    )
    validation_blocks: Positive | None = Field(
        None, description="blocks of a record that this share comes in; null: the data set's"
    )
    validation_records: list[str] | None = Field(
        None, description="records held out instead, by name"
    )
    validation_regions: list[str] | None = Field(
        None, description="regions held out instead: record:first-last, counted from 1"
    )
    validation_headers: Regex | None = Field(
        None,
        description="records held out instead: those with this regular expression in their header",
    )
    chromosomes: str | None = Field(
        None,
        min_length=1,
        description="table of records and their chromosomes, such as HPRC's chromAlias.txt: what a "
        "line says after a record's name counts as part of its header; the * is that of fasta, "
        "and may stand for a file that is not there",
    )

    annotation: str | None = Field(
        None,
        min_length=1,
        description="its genes, for gene_distance: GTF, GFF3 or BED, compressed or not; relative "
        "to the file that names it; the * is that of fasta",
    )
    annotation_names: dict[str, str | None] = Field(
        {}, description="record: its name in the annotation, where that differs; null: no genes"
    )
    without_annotation: Literal["keep", "drop"] | None = Field(
        None,
        description="what gene_distance does with a source that has no annotation, or none like "
        "the pattern that annotation is; null: the data set's",
    )

    @model_validator(mode="after")
    def _one_way(self) -> "Source":
        ways = [way for way in WAYS if getattr(self, way) is not None]
        if len(ways) > 1:
            raise ValueError(f"give one of {', '.join(WAYS)}, not several")
        if self.validation_blocks is not None and ways and ways != ["validation"]:
            raise ValueError(
                f"validation_blocks says where a share is held out, and {ways[0]} names what is; "
                "leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _stars(self) -> "Source":
        if "*" in str(Path(self.fasta).parent) or self.fasta.count("*") > 1:
            raise ValueError("fasta may have one *, in the file's name")
        for key in STARRED:
            if "*" not in self.fasta and "*" in (getattr(self, key) or ""):
                raise ValueError(f"{key} has a * and fasta has none for it to stand for")
        if self.only and "*" not in self.fasta:
            raise ValueError("only chooses among the files of a fasta with a *")
        return self

    @property
    def has_validation_rule(self) -> bool:
        """Whether the source says itself what is held out, so that the data set's
        validation_headers do not apply to it."""
        return any(getattr(self, key) is not None for key in (*WAYS, "validation_blocks"))

    def is_split_by_share(self, default_headers: str | None) -> bool:
        """Whether a share of the source is held out, and not what some key names; `default_headers`
        are the data set's validation_headers."""
        named = any(getattr(self, way) is not None for way in WAYS if way != "validation")
        return not named and (default_headers is None or self.has_validation_rule)


WAYS = ("validation", "validation_records", "validation_regions", "validation_headers")
"""The keys of a source that say what of it is held out."""

STARRED = ("fasta", "annotation", "chromosomes")
"""The keys of a source in which the * of fasta may stand."""


class Group(Section):
    """Sources that count as one in the mix."""

    weight: Positive | Literal["size"] = Field(
        1,
        description="parts of the mix, by tokens; 1 and 1: half each, so that a larger group is cut "
        "to the smaller one's size. size, in every group: all of every group",
    )
    sources: dict[SourceName, Source] = Field(min_length=1, description="FASTA files by name")


class DataConfig(Section):
    """A data set: what it is made from, how it is cut, and where it goes."""

    input_files: ClassVar[tuple[str, ...]] = tuple(f"groups.*.sources.*.{key}" for key in STARRED)

    output: str = Field(min_length=1, description="folder to write; relative to the current one")
    seq_length: Positive = Field(description="bases a fragment, and so a training sample")
    seed: NonNegative = Field(1234, description="decides what a mix leaves out, and the strands")
    max_n_fraction: Fraction = Field(0.1, description="fragments with a larger share of N go")
    validation: Share = Field(0.05, description="share of each source's fragments held out")
    validation_blocks: Positive = Field(
        20,
        description="blocks that this share comes in, evenly spread over each record long enough; "
        "short records stay whole. 1: the end of each file instead, by bases",
    )
    validation_headers: Regex | None = Field(
        None,
        description="regular expression: of sources that say nothing of their own, the records "
        "with this in their header are held out instead",
    )
    gene_distance: NonNegative | None = Field(
        None, description="fragments farther than this from every gene go, bp; null: none do"
    )
    total_tokens: Positive | None = Field(
        None, description="tokens of the train split at most, EODs included; null: all there are"
    )
    allow_fewer: bool = Field(
        False,
        description="where the sources hold fewer than total_tokens, take what they hold and say "
        "so; false: that is an error",
    )
    without_annotation: Literal["keep", "drop"] | None = Field(
        None, description="what gene_distance does with sources without annotation"
    )
    reverse_complement: Fraction = Field(
        0.0, description="share of the fragments written as reverse complement, both splits alike"
    )
    workers: Positive | None = Field(
        None,
        description="processes that read the sources; null: the usable cores, at most a source "
        "each. The data set is the same",
    )
    groups: dict[Name, Group] = Field(min_length=1, description="parts of the mix by name")

    @model_validator(mode="after")
    def _one_kind_of_weight(self) -> "DataConfig":
        by_size = [name for name, group in self.groups.items() if group.weight == "size"]
        by_number = [name for name in self.groups if name not in by_size]
        if by_size and by_number:
            raise ValueError(
                f"groups.{by_size[0]}.weight is size and groups.{by_number[0]}.weight is "
                f"{self.groups[by_number[0]].weight}; give size to every group, or a number to "
                "every group"
            )
        return self

    @model_validator(mode="after")
    def _all_have_genes(self) -> "DataConfig":
        if self.gene_distance is None or self.without_annotation is not None:
            return self
        for group, sources in ((name, group.sources) for name, group in self.groups.items()):
            for name, source in sources.items():
                if source.annotation is None and source.without_annotation is None:
                    raise ValueError(
                        f"gene_distance is set and groups.{group}.sources.{name} has no "
                        "annotation; give it one, or without_annotation: keep or drop"
                    )
        return self
