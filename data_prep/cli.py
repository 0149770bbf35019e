"""The command `gengram-data`, and its subcommand `build`."""

import json
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from data_prep.build import build as build_data_set
from data_prep.genes import ignored
from data_prep.manifest import add_fates
from data_prep.progress import Display
from data_prep.schema import DataConfig
from gengram_megatron.config.command_line import HELP_OPTIONS, Overrides, print_keys
from gengram_megatron.config.load import load_config
from gengram_megatron.data_set import read_manifest
from gengram_megatron.errors import UserError, run_program
from gengram_megatron.show import print_table


def build(
    config: Annotated[
        str | None,
        typer.Argument(metavar="CONFIG", help="The YAML file, as shown above.", show_default=False),
    ] = None,
    overrides: Overrides = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="replace a data set of other settings")
    ] = False,
    workers: Annotated[
        int | None, typer.Option("--workers", metavar="N", help="the key workers", min=1)
    ] = None,
    keys: Annotated[
        bool,
        typer.Option(
            "--keys",
            help="list every key (or only those named in place of CONFIG) with its allowed values, "
            "default and meaning; build nothing",
        ),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="for programs, instead of the table")
    ] = False,
) -> None:
    """Cut FASTA files into fragments and write a data set.

    Each record is cut on a grid into fragments of seq_length bases; a fragment and an
    end-of-document token make one document and one training sample. Letter case is folded and
    IUPAC's ambiguity codes are read as N. The groups are mixed by their weights, exactly, without
    repeating a fragment. Blocks spread over each record (or the records or regions you name) are
    held out for validation; fragments that cross a border of one are dropped.

    A complete config with every key; `--keys` lists the allowed values of each:

    \b
        output: datasets/apes          # relative to the current folder
        seq_length: 8192               # bases per fragment, and so per sample
        seed: 1234                     # decides what the mix leaves out, and strands
        validation: 0.05               # share held out
        validation_blocks: 20          # blocks per record; 1: the end of each file
        validation_headers: null       # a pattern, as under `others` below
        max_n_fraction: 0.1            # fragments with more N are dropped
        gene_distance: 5120            # and those farther than this from every gene
        without_annotation: drop       # all of a source without genes; or keep
        total_tokens: 50000000000      # of train, at most; null: all available
        allow_fewer: false             # true: if there are fewer, use them all
        reverse_complement: 0          # share of fragments written as other strand
        workers: 8                     # processes; null: one per core
        groups:
          human:
            weight: 1                  # parts of the mix; size in all groups: all of each
            sources:
              chm13:
                fasta: genomes/chm13.fa.gz
                validation_records: [chr20]
                annotation: genomes/chm13.gff3.gz
                annotation_names: {chrM: MT}   # record: name in the annotation
          apes:
            weight: 1
            sources:
              gorilla:
                fasta: genomes/gorilla.fa.gz
                validation_regions: ["chr20:1-5000000"]
                without_annotation: keep
              bonobo:
                fasta: genomes/bonobo.fa.gz
                validation: 0.1
          others:
            weight: 1
            sources:
              "*":                     # many files, each named by what * stands for
                fasta: genomes/*.fna.gz
                only: [GCA_0237, GCF_9]        # those whose names begin like this
                annotation: genomes/*.gff.gz
                chromosomes: genomes/*.chromAlias.txt  # for the headers
                validation_headers: "chromosome 20[^0-9]"

    A relative path of a fasta or annotation is resolved from the folder of the file that names it,
    or from the current folder if the command line names it. The output appears only when it is
    complete; if it exists and is up to date, nothing is done. After an interruption, run the same
    command again: unfinished work is kept in OUTPUT.building and the build resumes from there.
    """
    if keys:
        print_keys(DataConfig, [*filter(None, [config]), *(overrides or [])], as_json)
        return
    if config is None:
        raise UserError("gengram-data build takes a CONFIG; name its file, or use --keys")
    path = Path(config)
    changes = [*(overrides or [])]
    changes += [f"workers={workers}"] if workers is not None else []
    settings = load_config(path, changes, DataConfig)
    start = time.perf_counter()
    with Display(Console(stderr=True)) as display:
        try:
            manifest = build_data_set(settings, path.parent, overwrite, display.report, display.say)
        except KeyboardInterrupt:
            display.say("interrupted; run the same command again to resume")
            raise typer.Exit(130) from None
    if as_json:
        print(_as_json(Path(settings.output), manifest))
        return
    if manifest is None:
        print(f"{settings.output} is up to date")
        return
    print_table(_summary(manifest))
    if text := ignored({key: facts["genes"] for key, facts in manifest["sources"].items()}):
        print(text)
    print(f"wrote {settings.output} in {time.perf_counter() - start:.1f} s")


def _as_json(output: Path, written: dict[str, Any] | None) -> str:
    """Returns the data set's counts as JSON, and whether this build wrote it or it was up to date.

    Args:
        output: the folder of the data set.
        written: its manifest if this build wrote it; None if it was up to date.
    """
    manifest = written or read_manifest(output)
    counts = {key: manifest[key] for key in ("splits", "groups", "sources")}
    facts = {"output": str(output.absolute()), "written": written is not None, **counts}
    return json.dumps(facts, indent=2)


def _summary(manifest: dict[str, Any]) -> Table:
    """Returns a table of what became of the fragments of each source and group."""
    length = manifest["settings"]["seq_length"]
    table = Table(title=f"What became of the fragments of {length:,} bases")
    table.add_column("source or group", no_wrap=True)
    table.add_column("fragments", justify="right")
    rows: dict[str, dict[str, int]] = {}
    for group, sums in manifest["groups"].items():
        sources = manifest["sources"].items()
        rows |= {key: counts for key, counts in sources if key.startswith(f"{group}/")}
        rows[group] = sums
    for (name, counts), cells in zip(rows.items(), add_fates(table, list(rows.values()))):
        is_group = name in manifest["groups"]
        style = "bold" if is_group else None
        table.add_row(name, f"{counts['fragments']:,}", *cells, style=style, end_section=is_group)
    remainder_bases = sum(group["remainder_bases"] for group in manifest["groups"].values())
    remainder = f"{remainder_bases:,} bases at the ends of records are too few for a fragment."
    table.caption = f"{table.caption} {remainder}" if table.caption else remainder
    return table


COMMANDS = {
    "download": "data_prep.download.command",
    "build": "data_prep.cli",
    "inspect": "data_prep.inspect.command",
    "verify": "data_prep.verify.command",
}
"""The module of each command; the function that runs it has the command's name."""


def commands() -> None:
    """Turn genomes into data sets for pretraining."""


def program(words: list[str]) -> typer.Typer:
    """Returns the command-line program for the words of a command line.

    If the first word is a command, only that one is imported: importing all of them takes as long
    as preparing 100 Mbp.
    """
    app = typer.Typer(
        context_settings=HELP_OPTIONS,
        no_args_is_help=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
    )
    app.callback()(commands)
    for name in words[:1] if words and words[0] in COMMANDS else COMMANDS:
        app.command()(getattr(import_module(COMMANDS[name]), name))
    return app


def main() -> None:
    """Runs the command; an error that the user can fix is one sentence, with exit code 2."""
    run_program(program(sys.argv[1:]))
