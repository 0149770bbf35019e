"""What a download shows: bars while it runs, and the list of a dry run."""

from rich.console import Console
from rich.filesize import decimal
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from data_prep.download.plan import Item


class Bars:
    """A bar for all files and one for each that is coming, and a line for each that has come.

    Where there is no terminal, such as in a log file, only the lines are shown.
    """

    def __init__(self, console: Console, items: list[Item]):
        sizes = [item.size for item in items if not item.here]
        self._console = console
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._all = self._bars.add_task("all", total=None if None in sizes else sum(sizes))
        self._tasks: dict[str, TaskID] = {}
        self._here: dict[str, int] = {}

    def __enter__(self) -> "Bars":
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def received(self, name: str, here: int, size: int | None) -> None:
        """So many bytes of a file are there; of how many, if that is known."""
        if name not in self._tasks:
            self._tasks[name] = self._bars.add_task(name)
        self._bars.update(self._tasks[name], completed=here, total=size)
        self._bars.update(self._all, advance=here - self._here.get(name, 0))
        self._here[name] = here

    def stored(self, name: str, size: int) -> None:
        """A file is whole and in its place."""
        self.received(name, size, size)
        self._bars.update(self._tasks[name], visible=False)
        self._console.print(f"{name}: {decimal(size)}", highlight=False, soft_wrap=True)


def listing(items: list[Item]) -> Table:
    """All files of a download list and how they stand."""
    table = Table("file", "size", "checksum", "state", "from")
    for item in items:
        size = "unknown" if item.size is None else decimal(item.size)
        part = f"{decimal(item.partial)} here" if item.partial else "to fetch"
        state = "here" if item.here else part
        kinds = ", ".join(item.wanted.checksums) or "none"
        table.add_row(item.wanted.name, size, kinds, state, item.wanted.url)
    return table


def totals(items: list[Item]) -> str:
    """How much is to come, in a sentence."""
    missing = [item for item in items if not item.here]
    size = sum(item.size - item.partial for item in missing if item.size)
    unknown = sum(item.size is None for item in missing)
    more = f" and {files(unknown)} of unknown size" if unknown else ""
    return f"{files(len(items))}, {len(missing)} of them to fetch: {decimal(size)}{more}"


def files(count: int) -> str:
    """A number of files in words."""
    return f"{count} file" if count == 1 else f"{count} files"
