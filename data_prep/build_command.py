"""The command `gengram-data build`."""

import time
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from data_prep.build import build as build_data_set
from data_prep.genes import ignored
from data_prep.schema import DataConfig
from gengram_megatron.config.arguments import ConfigFile, Overrides
from gengram_megatron.config.load import load_config


def build(
    config: ConfigFile,
    overrides: Overrides = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="replace a data set of other settings")
    ] = False,
    workers: Annotated[
        int | None, typer.Option("--workers", metavar="N", help="the key workers", min=1)
    ] = None,
) -> None:
    """Cut FASTA files into fragments and write a data set.

    Each record is cut on a grid into fragments of seq_length bases; a fragment and an
    end-of-document token make one document and one training sample. Letter case is folded and
    IUPAC's ambiguity codes are read as N. The groups are mixed by their weights, exactly, without
    repeating a fragment. The end of each file (or the records or regions you name) is held out
    for validation; fragments that cross that border are dropped.

    A config in full:

    \b
        output: datasets/apes        # relative to the current folder
        seq_length: 8192
        seed: 1234                   # decides what the mix leaves out, and strands
        validation: 0.05             # share held out at the end of each file
        max_n_fraction: 0.1          # fragments with more N are dropped
        gene_distance: 5120          # fragments farther than this from every gene are dropped
        total_tokens: 50000000000    # of the train split, at most; left out: all there are
        allow_fewer: false           # true: where there are fewer, take them all and say so
        reverse_complement: 0        # share of fragments written as the other strand
        workers: 8                   # processes; left out: the cores, at most a source each
        groups:
          human:
            weight: 1
            sources:
              chm13:
                fasta: genomes/chm13.fa.gz
                validation_records: [chr20]
                annotation: genomes/chm13.gff3.gz
          apes:
            weight: 1
            sources:
              gorilla:
                fasta: genomes/gorilla.fa.gz
                validation_regions: ["chr20:1-5000000"]
                without_annotation: keep
          others:
            weight: 1
            sources:
              "*":                       # many files, each named by what the * stands for
                fasta: genomes/*.fna.gz
                annotation: genomes/*.gff.gz
                validation_headers: "chromosome 20[^0-9]"

    A relative fasta or annotation is looked for from the folder of the file that names it, or from
    the current folder if the command line does. The output appears only when it is complete; if it
    exists and is up to date, nothing is done. Run it again after an interruption: until it is
    complete, what is done lies in OUTPUT.building, and it goes on from there.
    """
    words = [*(overrides or [])]
    words += [f"workers={workers}"] if workers is not None else []
    settings = load_config(config, words, DataConfig)
    start = time.perf_counter()
    with Display(Console(stderr=True)) as display:
        try:
            manifest = build_data_set(
                settings, config.parent, overwrite, display.report, display.say
            )
        except KeyboardInterrupt:
            display.say("interrupted; the same command goes on from here")
            raise typer.Exit(130) from None
    if manifest is None:
        print(f"{settings.output} is up to date")
        return
    Console().print(_summary(manifest))
    if text := ignored({key: facts["genes"] for key, facts in manifest["sources"].items()}):
        print(text)
    print(f"wrote {settings.output} in {time.perf_counter() - start:.1f} s")


class Display:
    """A line that says what is being done and how fast, and lines that stay.

    Where there is no terminal, such as in a log file, only the lines that stay are shown.
    """

    def __init__(self, console: Console):
        self._console = console
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}: {task.completed:,.1f} Mbp"),
            TextColumn("{task.fields[speed]}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> "Display":
        return self  # it starts with the first report, when the workers are there

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def report(self, doing: str, bases: int) -> None:
        """So many more bases were gone through."""
        task = next((task for task in self._progress.tasks if task.description == doing), None)
        if task is None:
            self._progress.start()
            for before in self._progress.task_ids:
                self._progress.update(before, visible=False)
            self._progress.add_task(doing, total=None, speed="")
            return self.report(doing, bases)
        done = task.completed + bases / 1e6
        self._progress.update(
            task.id, completed=done, speed=f"{done / max(task.elapsed or 0, 1e-3):,.0f} Mbp/s"
        )

    def say(self, text: str) -> None:
        """Show a line that stays."""
        self._console.print(text, highlight=False, soft_wrap=True)


def _summary(manifest: dict) -> Table:
    """Where the fragments of each source and group went."""
    length = manifest["settings"]["seq_length"]
    table = Table(title=f"Fragments of {length:,} bases, and where they went")
    table.add_column("", no_wrap=True)
    columns = {
        "all": ("fragments",),
        "train": ("train",),
        "valid.": ("validation",),
        "N": ("too_many_n",),
        "border": ("straddles",),
        "genes": ("far_from_genes",),
        "mix": ("left_out_of_train", "left_out_of_validation"),
        "rest, bp": ("remainder_bases",),
    }
    table.caption = (
        "dropped: N, too many of it; border, crossing that of the validation split; genes, too "
        "far from them; mix, left out for the groups' weights; rest, bases at record ends too few "
        "for a fragment"
    )
    for name in columns:
        table.add_column(name, justify="right")
    for group, sums in manifest["groups"].items():
        parts = {
            key: counts
            for key, counts in manifest["sources"].items()
            if key.startswith(f"{group}/")
        }
        for name, counts in {**parts, group: sums}.items():
            cells = [f"{sum(counts[key] for key in keys):,}" for keys in columns.values()]
            table.add_row(name, *cells, style="bold" if name == group else None)
        table.add_section()
    return table
