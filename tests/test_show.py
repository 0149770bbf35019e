"""Tables as people and programs get them: nothing cut, no name or number broken."""

import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from contextlib import suppress

import pytest
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gengram_megatron.show import print_table
from tests.layouts.launch import ROOT
from tests.training.tiny import environment

NAMES = ("layers-3-6-10_window-21_seed-1", "model.gengram.share_reverse_complements")
NUMBERS = ("1,234,567,890", "7.4012 GB")
SENTENCE = "a sentence of many words that has to be folded somewhere [1, 2, 3] between two of them"


def a_table() -> Table:
    table = Table(title="A title", caption="a caption")
    table.add_column("name", no_wrap=True)
    table.add_column("number", justify="right")
    table.add_column("meaning")
    for name, number in zip(NAMES, NUMBERS):
        table.add_row(name, number, SENTENCE)
    table.add_section()
    table.add_row("two lines", "", Text("first\nsecond\twith a tab", style="bold"))
    return table


def at_terminal(table: Table, width: int) -> list[str]:
    out = io.StringIO()
    print_table(table, Console(file=out, force_terminal=True, width=width, color_system=None))
    return re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue()).splitlines()


@pytest.mark.parametrize("width", [40, 60, 79, 80, 81, 100, 120, 200])
def test_nothing_is_cut_or_broken_at_a_terminal(width):
    lines = at_terminal(a_table(), width)
    assert not any("…" in line for line in lines)
    for whole in (*NAMES, *NUMBERS, *SENTENCE.replace("[1, 2, 3] ", "").split(), "caption"):
        assert any(whole in line for line in lines), whole
    words = [word for line in lines for word in line.split()]
    assert words.count("between") == len(NAMES)  # every row is there once
    too_long = [line for line in lines if len(line) > width]
    assert not too_long or width < len("meaning ") + max(map(len, NAMES))


def test_a_wide_table_becomes_blocks_of_lines():
    wide = Table()
    for number in range(12):
        wide.add_column(f"heading {number}", justify="right")
    wide.add_row(*(f"{number},000,000" for number in range(12)))
    lines = at_terminal(wide, 80)
    assert len(lines) == 12 and all(len(line) <= 80 for line in lines)
    assert lines[5].split() == ["heading", "5", "5,000,000"]


def test_in_a_pipe_a_row_is_a_line_between_tabs(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "20")
    print_table(a_table())
    title, heading, *rows, caption = capsys.readouterr().out.splitlines()
    assert (title, caption) == ("# A title", "# a caption")
    assert heading.split("\t") == ["name", "number", "meaning"]
    assert [row.split("\t") for row in rows] == [
        *([name, number, SENTENCE] for name, number in zip(NAMES, NUMBERS)),
        ["two lines", "", "first; second with a tab"],
    ]


TABLES = {
    "plan": ["plan", "configs/smoke/cpu.yaml", "--nproc", "4"],
    "suggestions": ["plan", "configs/smoke/cpu.yaml", "--suggest", "--gpus", "4"],
    "sweep": ["sweep", "configs/sweeps/windows_cpu.yaml"],
    "keys": ["config", "--keys", "model.gengram"],
    "doctor": ["doctor", "configs/smoke/cpu.yaml", "--quick"],
}


@pytest.mark.parametrize("words", TABLES.values(), ids=TABLES)
def test_commands_at_a_terminal_of_80_columns(words):
    """All that a pipe gets is there at a terminal too, and nothing is longer than a line."""
    main, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 80, 0, 0))
    variables = {**environment(), "TERM": "xterm"}
    del variables["COLUMNS"]
    command = [sys.executable, "-m", "gengram_megatron", *words]
    with subprocess.Popen(command, cwd=ROOT, env=variables, stdout=terminal) as process:
        os.close(terminal)
        shown = b""
        with suppress(OSError):  # EIO: the other side is closed
            while part := os.read(main, 65536):
                shown += part
    os.close(main)
    assert process.returncode == 0
    text = re.sub(r"\x1b\[[0-9;]*m", "", shown.decode())
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text
    piped = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    whole = {word for line in piped.stdout.splitlines() for word in re.split(r"[\s;#]+", line)}
    headings = {"what", "number", "kind"}  # of tables that show none to people
    assert whole - headings <= set(re.split(r"[\s;│┃]+", text))
