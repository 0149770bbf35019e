"""Every key of a data config: its name, type, default and meaning."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from gengram_megatron.config.schema import Fraction, NonNegative, Positive, Section

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]
Share = Annotated[float, Field(ge=0, lt=1)]


class Source(Section):
    """One FASTA file, and what of it is held out for validation."""

    fasta: str = Field(
        min_length=1,
        description="plain, gzip, bgzip, bzip2, xz or zstd; relative to the config file's folder",
    )
    validation: Share | None = Field(
        None, description="share of the bases held out at the end; null: the data set's"
    )
    validation_records: list[str] | None = Field(
        None, description="records held out instead, by name"
    )
    validation_regions: list[str] | None = Field(
        None, description="regions held out instead: record:first-last, counted from 1"
    )

    annotation: str | None = Field(
        None,
        min_length=1,
        description="its genes, for gene_distance: GTF, GFF3 or BED, compressed or not; relative "
        "to the config file's folder",
    )
    annotation_names: dict[str, str | None] = Field(
        {}, description="record: its name in the annotation, where that differs; null: no genes"
    )
    without_annotation: Literal["keep", "drop"] | None = Field(
        None, description="what gene_distance does with a source that has no annotation"
    )

    @model_validator(mode="after")
    def _one_way(self) -> "Source":
        ways = (self.validation, self.validation_records, self.validation_regions)
        if sum(way is not None for way in ways) > 1:
            raise ValueError(
                "give one of validation, validation_records and validation_regions, not several"
            )
        return self


class Group(Section):
    """Sources that count as one in the mix."""

    weight: Positive = Field(1, description="parts of the mix, by tokens; 1 and 1: half each")
    sources: dict[Name, Source] = Field(min_length=1, description="FASTA files by name")


class DataConfig(Section):
    """A data set: what it is made from, how it is cut, and where it goes."""

    output: str = Field(min_length=1, description="folder to write; relative to the current one")
    seq_length: Positive = Field(description="bases a fragment, and so a training sample")
    seed: NonNegative = Field(1234, description="decides what a mix leaves out, and the strands")
    max_n_fraction: Fraction = Field(0.1, description="fragments with a larger share of N go")
    validation: Share = Field(
        0.05, description="share of each source's bases held out, at the end of its file"
    )
    gene_distance: NonNegative | None = Field(
        None, description="fragments farther than this from every gene go, bp; null: none do"
    )
    total_tokens: Positive | None = Field(
        None, description="tokens of the train split at most, EODs included; null: all there are"
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
    def _all_have_genes(self) -> "DataConfig":
        if self.gene_distance is None:
            return self
        for group, sources in ((name, group.sources) for name, group in self.groups.items()):
            for name, source in sources.items():
                if source.annotation is None and source.without_annotation is None:
                    raise ValueError(
                        f"gene_distance is set and groups.{group}.sources.{name} has no "
                        "annotation; give it one, or without_annotation: keep or drop"
                    )
        return self
