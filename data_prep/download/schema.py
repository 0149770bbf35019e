"""Every key of a download list: its name, type, default and meaning."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from gengram_megatron.config.keys import NonNegative, Positive, Section

Accession = Annotated[str, Field(pattern=r"^GC[AF]_[0-9]{9}\.[0-9]+$")]
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._+-]*$")]
Url = Annotated[str, Field(pattern=r"^(https?|s3)://[^/]+/.*[^/]$")]
Md5 = Annotated[str, Field(pattern=r"^[0-9a-fA-F]{32}$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-fA-F]{64}$")]


class Ncbi(Section):
    """Assemblies of NCBI by accession: the genome, and its annotation if there is one."""

    assemblies: list[Accession] = Field(min_length=1, description="GCA_ or GCF_, with the version")
    annotation: Literal["gff", "gtf", "none"] = Field(
        "gff", description="which annotation to fetch, if there is one"
    )
    base: Annotated[str, Field(pattern="^https?://")] = Field(
        "https://ftp.ncbi.nlm.nih.gov/genomes/all", description="NCBI's folder, or a mirror of it"
    )


class Index(Section):
    """A table with the URL of a file in each row, such as HPRC's index of its assemblies."""

    table: str = Field(
        min_length=1, description="CSV or TSV: a URL, or a path relative to the file that names it"
    )
    url: str = Field("assembly", min_length=1, description="column of the files' URLs")
    md5: str | None = Field(
        None, description="column of their MD5, or of the URL of a file that holds it"
    )
    rows: dict[str, Annotated[list[str], Field(min_length=1)]] = Field(
        {}, description="use only rows in which this column has one of these values"
    )


class File(Section):
    """One file by its URL."""

    url: Url = Field(description="http, https or s3")
    name: FileName | None = Field(
        None, description="name to store it as; null: the URL's last part"
    )
    md5: Md5 | None = Field(None, description="checked if given")
    sha256: Sha256 | None = Field(None, description="checked if given")


class DownloadConfig(Section):
    """A download list: what to fetch, from where, and into which folder."""

    input_files: ClassVar[tuple[str, ...]] = ("indexes.*.table",)

    output: str = Field(min_length=1, description="folder to fill; relative to the current one")
    parallel: Positive = Field(4, description="files at a time")
    retries: NonNegative = Field(5, description="more tries when a server or the network fails")
    backoff: Annotated[float, Field(ge=0, le=60)] = Field(
        1.0, description="seconds before the second try; doubled each time"
    )
    timeout: Annotated[float, Field(gt=0)] = Field(
        60.0, description="seconds without a byte after which a try fails"
    )
    ncbi: Ncbi | None = Field(None, description="assemblies by accession")
    indexes: dict[str, Index] = Field({}, description="tables of URLs, by any name")
    files: list[File] = Field([], description="files by URL")

    @model_validator(mode="after")
    def _something(self) -> "DownloadConfig":
        if not (self.ncbi or self.indexes or self.files):
            raise ValueError("there is nothing to download; give ncbi, indexes or files")
        return self
