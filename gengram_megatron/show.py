"""Prints tables for people at a terminal, and as plain lines for programs.

At a terminal a table is fitted into its width: columns of numbers and names are never folded,
columns of text are folded at words, and a table that still does not fit is shown as a block of
lines for each row. Anywhere else, such as in a pipe or a file, each row is one line of
tab-separated cells.
"""

import sys
import textwrap
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # rich is imported only when needed, so that commands start quickly
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

NARROWEST = 20
"""Columns of text are not folded to fewer characters than this, because blocks are then easier to
read."""


def print_table(table: "Table", console: "Console | None" = None) -> None:
    """Prints a table on standard output.

    Cells and headings are literal text: brackets in them are not markup. Right-justified columns
    and those with no_wrap are not folded, all others are folded at words. The title and the caption
    become lines above and below, which begin with # if standard output is not a terminal.

    Args:
        table: of its properties only the columns' headings, justify and no_wrap, the rows' styles
            and sections, and title, caption and show_header are used.
        console: where to print instead; used by tests.
    """
    from rich.console import Console

    at_terminal = console.is_terminal if console else _stdout_is_terminal()
    console = console or Console()
    if at_terminal:
        _print_for_people(table, console)
    else:
        print(*_lines(table), sep="\n", file=console.file)


def print_text(text: str) -> None:
    """Prints a line on standard output, folded at words if that is a terminal."""
    if _stdout_is_terminal():
        from rich.console import Console

        text = _fold(text, Console().width)
    print(text)


def _stdout_is_terminal() -> bool:
    # rich's is_terminal is not used, because the variable FORCE_COLOR makes it true for pipes too.
    # stdout is None if the shell closed it.
    return sys.stdout is not None and sys.stdout.isatty()


def _lines(table: "Table") -> list[str]:
    """Returns a table as lines of tab-separated cells."""
    title, caption = (_plain(text) for text in (table.title, table.caption))
    headings = [_plain(column.header) for column in table.columns]
    lines = [f"# {title}"] if title else []
    lines += ["\t".join(headings)] if any(headings) else []
    lines += ["\t".join(map(_plain, row)) for row in _rows(table)]
    lines += [f"# {caption}"] if caption else []
    return lines


def _rows(table: "Table") -> list[tuple[object, ...]]:
    return list(zip(*(column.cells for column in table.columns), strict=True))


def _plain(cell: object) -> str:
    """Returns a cell's text in one line without tabs."""
    text = "" if cell is None else str(cell)  # str of a rich Text is its text without styles
    return "; ".join(" ".join(line.split("\t")) for line in text.splitlines())


def _text(cell: object) -> "Text":
    from rich.text import Text

    return cell if isinstance(cell, Text) else Text("" if cell is None else str(cell))


def _print_for_people(table: "Table", console: "Console") -> None:
    def print_folded(text: object, style: str) -> None:
        if text:
            console.print(_text(_fold(str(text), console.width)), style=style, soft_wrap=True)

    print_folded(table.title, "bold")
    widths = _column_widths(table, console.width)
    if widths is None:
        _print_blocks(table, console)
    else:
        console.print(_fitted(table, widths))
    print_folded(table.caption, "dim")


def _fold(text: str, width: int) -> str:
    """Folds each line of a text at spaces only; longer words are not broken."""
    lines = (
        textwrap.fill(line, width, break_long_words=False, break_on_hyphens=False)
        for line in text.splitlines()
    )
    return "\n".join(lines)


def _column_widths(table: "Table", width: int) -> list[int] | None:
    """Returns the width of each column in characters; None if the table cannot be that narrow."""
    from rich.cells import cell_len

    least, most = [], []
    for column in table.columns:
        cells = [str(cell) for cell in column.cells]
        lines = [line for cell in cells for line in cell.splitlines()]
        longest = max(map(cell_len, lines), default=0)
        words = [word for cell in cells for word in cell.split()]
        heading = str(column.header) if table.show_header else ""
        of_heading = max(map(cell_len, heading.split()), default=0)
        kept_whole = column.no_wrap or column.justify == "right"
        folded = max(max(map(cell_len, words), default=0), min(longest, NARROWEST))
        least.append(max(longest if kept_whole else folded, of_heading, 1))
        most.append(max(longest, cell_len(heading), 1))
    borders = 3 * len(least) + 1  # lines between columns, and a space on both sides of each cell
    spare = width - borders - sum(least)
    if spare < 0:
        return None
    widths = list(least)
    for _ in range(spare):
        # The column whose cells need the most lines gets the next character.
        neediest = max(range(len(widths)), key=lambda index: most[index] / widths[index])
        if widths[neediest] >= most[neediest]:
            break
        widths[neediest] += 1
    return widths


def _fitted(table: "Table", widths: list[int]) -> "Table":
    """Returns the table with cells folded to these widths."""
    from rich.table import Table

    fitted = Table(show_header=table.show_header)
    for column, width in zip(table.columns, widths, strict=True):
        heading = _text(_fold(str(column.header), width))
        fitted.add_column(heading, justify=column.justify, style=column.style, width=width)
    for cells, row in zip(_rows(table), table.rows, strict=True):
        folded = (_folded(cell, width) for cell, width in zip(cells, widths, strict=True))
        fitted.add_row(*folded, style=row.style, end_section=row.end_section)
    return fitted


def _folded(cell: object, width: int) -> "Text":
    """Returns a cell folded to a width, with its style."""
    from rich.text import Text

    text = _text(cell)
    folded = _fold(text.plain, width)
    return text if folded == text.plain else Text(folded, style=text.style)


def _print_blocks(table: "Table", console: "Console") -> None:
    """Prints each row as a block: its first cell, and below it a line for each cell that is not
    empty."""
    from rich.text import Text

    headings = (str(column.header) if table.show_header else "" for column in table.columns)
    first, *labels = headings
    label_width = max(map(len, labels), default=0)
    indent = " " * (label_width + 4)
    for cells in _rows(table):
        heading, *values = map(_text, cells)
        console.print(Text(f"{first} {heading.plain}".strip(), style="bold"), soft_wrap=True)
        for label, value in zip(labels, values, strict=True):
            if not value.plain:
                continue
            lines = _fold(value.plain, max(console.width - len(indent), NARROWEST)).splitlines()
            text = f"  {label:{label_width}}  " + f"\n{indent}".join(lines)
            console.print(Text(text), soft_wrap=True)
