"""From an accession to the files of an assembly at NCBI.

All assemblies lie in one tree, https://ftp.ncbi.nlm.nih.gov/genomes/all: GCA_047047975.1 is in
GCA/047/047/975/, in a folder named for accession and assembly, whose md5checksums.txt lists the
files it holds.
"""

import re
from html.parser import HTMLParser

from data_prep.download.schema import Ncbi
from data_prep.download.wanted import Wanted, name_in
from data_prep.download.web import Web
from gengram_megatron.errors import UserError


def assembly_files(accession: str, settings: Ncbi, web: Web) -> list[Wanted]:
    """The genome of an assembly, and its annotation if it is wanted and there is one."""
    folder_url = _folder(accession, settings.base, web)
    folder = folder_url.rsplit("/", 1)[1]
    checksums = _checksums(web.text(f"{folder_url}/md5checksums.txt"))
    # Whole names, because *_genomic.fna.gz would also match cds_from_genomic and rna_from_genomic.
    genome = f"{folder}_genomic.fna.gz"
    if genome not in checksums:
        raise UserError(
            f"{accession} has no genome at {folder_url}, perhaps because it was withdrawn; "
            "take another version of it or leave it out of ncbi.assemblies"
        )
    annotation = f"{folder}_genomic.{settings.annotation}.gz"
    return [
        Wanted(name, f"{folder_url}/{name}", {"md5": checksums[name]})
        for name in (genome, annotation)
        if name in checksums
    ]


def _folder(accession: str, base: str, web: Web) -> str:
    kind, digits = accession[:3], accession[4:13]
    parent = "/".join((base.rstrip("/"), kind, digits[:3], digits[3:6], digits[6:]))
    links = _Links()
    links.feed(web.text(f"{parent}/"))
    folders = [name_in(link) for link in links.found if link.endswith("/")]
    for folder in folders:
        if folder.startswith(f"{accession}_"):
            return f"{parent}/{folder}"
    versions = sorted({name for name in map(_accession, folders) if name})
    there = f"there is {' and '.join(versions)}" if versions else "nor is another version of it"
    raise UserError(f"{accession} is not in {parent}/, {there}; correct ncbi.assemblies")


def _accession(folder: str) -> str | None:
    match = re.match(r"GC[AF]_\d{9}\.\d+(?=_)", folder)
    return match[0] if match else None


def _checksums(text: str) -> dict[str, str]:
    """md5checksums.txt as file name to MD5; its lines are `<md5>  ./<name>`."""
    pairs = (line.split(maxsplit=1) for line in text.splitlines() if line.strip())
    return {pair[1].strip().removeprefix("./"): pair[0].lower() for pair in pairs if len(pair) == 2}


class _Links(HTMLParser):
    """The links of a page that lists a folder."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "a":
            self.found += [value for name, value in attrs if name == "href" and value]
