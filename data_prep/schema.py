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
        raise ValueError(f"this is not a regular expression: {error}") from None
    return text


Regex = Annotated[str, Field(min_length=1), AfterValidator(_regex)]
Share = Annotated[float, Field(ge=0, lt=1)]


class Source(Section):
    """One or more FASTA files, and which part of them is held out for validation."""

    fasta: str = Field(
        min_length=1,
        description="plain, gzip, bgzip, bzip2, xz or zstd; relative to the file that names it. "
        "A * in its name stands for any text. The pattern must match one file; if the source is "
        "called *, it may match many, and each is a source named by that text",
    )
    only: list[Words] | None = Field(
        None,
        min_length=1,
        description="use only the files that fasta matches whose text for the * begins with one of "
        "these",
    )
    validation: Share | None = Field(
        None, description="share of the fragments held out; null: the data set's"
    )
    validation_blocks: Positive | None = Field(
        None, description="blocks per record that make up this share; null: the data set's"
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
        description="table of records and their chromosomes, such as HPRC's chromAlias.txt: the "
        "rest of a line after a record's name counts as part of its header; a * is that of fasta, "
        "and the file may be missing then",
    )

    annotation: str | None = Field(
        None,
        min_length=1,
        description="its genes, for gene_distance: GTF, GFF3 or BED, compressed or not; relative "
        "to the file that names it; a * is that of fasta",
    )
    annotation_names: dict[str, str | None] = Field(
        {}, description="record: its name in the annotation, if that differs; null: no genes"
    )
    without_annotation: Literal["keep", "drop"] | None = Field(
        None,
        description="what gene_distance does with a source that has no annotation, or no file that "
        "matches the pattern in annotation; null: the data set's",
    )

    @model_validator(mode="after")
    def _one_way(self) -> "Source":
        ways = [way for way in WAYS if getattr(self, way) is not None]
        if len(ways) > 1:
            raise ValueError(f"give one of {', '.join(WAYS)}, not several")
        if self.validation_blocks is not None and ways and ways != ["validation"]:
            raise ValueError(
                f"validation_blocks says where a share is held out, but {ways[0]} names what is "
                "held out; leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _stars(self) -> "Source":
        if "*" in str(Path(self.fasta).parent) or self.fasta.count("*") > 1:
            raise ValueError("fasta may have one *, in the file's name")
        for key in STARRED:
            if "*" not in self.fasta and "*" in (getattr(self, key) or ""):
                raise ValueError(f"{key} has a *, but fasta has none that it could refer to")
        if self.only and "*" not in self.fasta:
            raise ValueError("only needs a fasta with a *: it chooses among the files that match")
        return self

    @property
    def has_validation_rule(self) -> bool:
        """Whether the source has a validation key itself, so that the data set's
        validation_headers do not apply to it."""
        return any(getattr(self, key) is not None for key in (*WAYS, "validation_blocks"))

    def is_split_by_share(self, default_headers: str | None) -> bool:
        """Returns whether a share of the source is held out, rather than what some key names.

        Args:
            default_headers: the data set's validation_headers.
        """
        named = any(getattr(self, way) is not None for way in WAYS if way != "validation")
        return not named and (default_headers is None or self.has_validation_rule)


WAYS = ("validation", "validation_records", "validation_regions", "validation_headers")
"""The keys of a source that say which part of it is held out."""

STARRED = ("fasta", "annotation", "chromosomes")
"""The keys of a source that may contain a *, which is that of fasta."""


class Group(Section):
    """Sources that share one weight in the mix."""

    weight: Positive | Literal["size"] = Field(
        1,
        description="parts of the mix, by tokens; 1 and 1: half each, so that a larger group is "
        "cut to the smaller one's size. size, in every group: all of every group",
    )
    sources: dict[SourceName, Source] = Field(min_length=1, description="FASTA files by name")


class DataConfig(Section):
    """A data set: what it is made from, how it is cut, and where it goes."""

    input_files: ClassVar[tuple[str, ...]] = tuple(f"groups.*.sources.*.{key}" for key in STARRED)

    output: str = Field(min_length=1, description="folder to write; relative to the current one")
    seq_length: Positive = Field(description="bases per fragment, and so per training sample")
    seed: NonNegative = Field(1234, description="decides what a mix leaves out, and the strands")
    max_n_fraction: Fraction = Field(0.1, description="drop fragments with a larger share of N")
    validation: Share = Field(0.05, description="share of each source's fragments held out")
    validation_blocks: Positive = Field(
        20,
        description="blocks per record that make up this share, evenly spread over each record "
        "that is long enough; short records stay whole. 1: the end of each file instead, by bases",
    )
    validation_headers: Regex | None = Field(
        None,
        description="regular expression: in sources without a validation key of their own, the "
        "records whose header matches it are held out instead",
    )
    gene_distance: NonNegative | None = Field(
        None, description="drop fragments farther than this from every gene, bp; null: none"
    )
    total_tokens: Positive | None = Field(
        None, description="tokens of the train split at most, with EODs; null: all available"
    )
    allow_fewer: bool = Field(
        False,
        description="if the sources hold fewer than total_tokens, use what they hold and say so; "
        "false: that is an error",
    )
    without_annotation: Literal["keep", "drop"] | None = Field(
        None, description="what gene_distance does with sources without annotation"
    )
    reverse_complement: Fraction = Field(
        0.0, description="share of the fragments written as reverse complement, in both splits"
    )
    workers: Positive | None = Field(
        None,
        description="processes that read the sources; null: one per usable core, but no more than "
        "sources. Does not change the data set",
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
