"""The command `gengram-data download`."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.filesize import decimal

from data_prep.download import run
from data_prep.download.display import Bars, files, listing, totals
from data_prep.download.record import RECORD
from data_prep.download.schema import DownloadConfig
from data_prep.download.web import Web
from gengram_megatron.config.arguments import ConfigFile, Overrides
from gengram_megatron.config.load import load_config


def download(
    config: ConfigFile,
    overrides: Overrides = None,
    out: Annotated[
        str | None, typer.Option("--out", metavar="FOLDER", help="the key output")
    ] = None,
    parallel: Annotated[
        int | None, typer.Option("--parallel", metavar="N", help="the key parallel", min=1)
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="list files and sizes, and fetch nothing")
    ] = False,
) -> None:
    """Fetch genomes and their annotations, and verify them.

    Takes assemblies of NCBI by accession (the genome as FASTA, and the annotation where there is
    one), tables of addresses such as HPRC's index of its assemblies, and single URLs. Run it
    again after an interruption: whole files are kept, and partial ones are gone on with.

    A download list in full:

    \b
        output: genomes              # relative to the current folder
        parallel: 4                  # files at a time
        retries: 5                   # more tries; pauses of 1, 2, 4, ... seconds (backoff: 1)
        timeout: 60                  # seconds without a byte that end a try
        ncbi:
          annotation: gff            # or gtf, or none
          assemblies:
            - GCA_047047975.1        # with the version
            - GCF_008728515.1
        indexes:
          hprc:
            table: hprc.index.csv    # CSV or TSV; path relative to this file, or URL
            url: assembly            # column of the files' addresses: http, https or s3
            md5: assembly_md5        # column of checksums, or of addresses of .md5 files
            rows:                    # only these; all rows without it
              sample_id: [HG00408, HG00597]
        files:
          - url: https://example.org/chm13.fa.gz
            name: chm13v2.fa.gz      # the URL's last part without it
            md5: 0123456789abcdef0123456789abcdef       # or sha256, or neither

    A file has its own name only when it is whole and its checksum is right; until then it is
    NAME.partial. URL, size and checksums of each are in downloads.json beside the files.
    https_proxy and no_proxy in the environment are heeded.
    """
    words = [*(overrides or [])]
    words += [f"output={json.dumps(out)}"] if out is not None else []  # 2024 is a folder too
    words += [f"parallel={parallel}"] if parallel is not None else []
    settings = load_config(config, words, DownloadConfig)
    web = Web(settings.retries, settings.backoff, settings.timeout)
    console = Console(stderr=True)
    with console.status("asking for sizes and checksums"):
        items = run.plan(settings, config.parent, web)
    if dry_run:
        Console().print(listing(items))
        print(totals(items))
        return
    with Bars(console, items) as bars:
        sizes = run.download(settings, items, web, bars)
    folder = Path(settings.output)
    print(
        f"fetched {files(len(sizes))} ({decimal(sum(sizes))}) into {folder}; "
        f"{len(items) - len(sizes)} of {len(items)} were there already; {folder / RECORD} lists all"
    )
