"""What gengram-data shows: tables in a pipe and at a terminal, keys, JSON, and a config in full."""

import inspect
import io
import json
import textwrap
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from data_prep import cli as build_command
from data_prep.cli import program
from data_prep.fragment import Fate
from data_prep.inspect.command import sample_table, tables
from data_prep.inspect.contents import contents, describe, locate
from data_prep.inspect.opened import DataSet
from data_prep.manifest import FATES
from data_prep.schema import DataConfig
from gengram_megatron.config.keys import Keys
from gengram_megatron.data_set import read_manifest
from gengram_megatron.errors import UserError
from gengram_megatron.show import print_table

ROOT = Path(__file__).parent.parent
SOURCE = "hg002-paternal-chromosome20"


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with data.yaml and the data set `out` built from it."""
    folder = tmp_path_factory.mktemp("tables")
    (folder / "a.fa").write_text(f">a\n{'ACGTTGCA' * 200}{'N' * 40}\n")
    (folder / "b.fa").write_text(f">b\n{'ACCTTGGA' * 100}ACG\n")
    groups = {
        "human": {"sources": {SOURCE: {"fasta": "a.fa"}}},
        "apes": {"sources": {"b": {"fasta": "b.fa"}}},
    }
    settings = {"output": str(folder / "out"), "seq_length": 8, "workers": 1, "groups": groups}
    (folder / "data.yaml").write_text(yaml.safe_dump(settings))
    assert gengram_data("build", folder / "data.yaml").exit_code == 0
    return folder


def gengram_data(*words: object):
    return CliRunner().invoke(program([]), [*map(str, words)])


def rows_of(text: str) -> dict[str, dict[str, str]]:
    """The rows of a piped table, each by its first cell, as heading: cell."""
    headings, *rows = (line.split("\t") for line in text.splitlines() if "\t" in line)
    assert {len(row) for row in rows} == {len(headings)}
    return {row[0]: dict(zip(headings, row)) for row in rows}


def test_the_summary_of_a_build_in_a_pipe(built):
    done = gengram_data("build", built / "data.yaml", "--overwrite")
    rows, manifest = rows_of(done.stdout), read_manifest(built / "out")
    assert list(rows) == ["apes/b", "apes", f"human/{SOURCE}", "human"]
    for name, counts in {**manifest["sources"], **manifest["groups"]}.items():
        shown = {
            heading: int(cell.replace(",", "")) for heading, cell in list(rows[name].items())[1:]
        }
        assert shown.pop("fragments") == counts["fragments"] == sum(shown.values())
        for heading, count in shown.items():
            assert count == sum(counts[fate] for fate in FATES[heading][0])
    assert rows["human"]["too many N"] == "5" and "far from genes" not in rows["human"]
    assert "3 bases at the ends of records" in done.stdout


def test_every_fate_has_one_word():
    counted = [fate for fates, _ in FATES.values() for fate in fates]
    assert sorted(counted) == sorted(fate.name.lower() for fate in Fate)


@pytest.mark.parametrize("width", [60, 80, 120])
def test_no_cell_is_cut_at_a_terminal(built, width):
    data = DataSet(built / "out")
    said = describe(data, contents(data, None, lambda count: None), by_sequence=True)
    shown = [*tables(said), sample_table(locate(data, "train", 0))]
    shown.append(build_command._summary(read_manifest(built / "out")))
    for table in shown:
        out = io.StringIO()
        console = Console(file=out, force_terminal=True, width=width, color_system=None)
        print_table(table, console)
        text = out.getvalue()
        assert "…" not in text and max(map(len, text.splitlines())) <= max(width, 64 + 16)
        for column in table.columns:
            if column.no_wrap or column.justify == "right":
                assert all(str(cell) in text for cell in column.cells)


def test_inspect_in_a_pipe(built):
    text = gengram_data("inspect", built / "out", "--sequences").stdout
    blocks = text.split("\n# ")
    assert len([line for line in text.splitlines() if "\t" not in line and line[0] != "#"]) == 0
    (where,) = (block for block in blocks if block.startswith("Where the fragments come from"))
    cells = [line.split("\t") for line in where.splitlines() if line.startswith("human\t")]
    assert [row[1] for row in cells] == ["train", "validation"]
    assert all(float(row[3]) == 50 for row in cells)


def test_a_build_for_programs(built):
    done = gengram_data("build", built / "data.yaml", "--json")
    said, manifest = json.loads(done.stdout), read_manifest(built / "out")
    assert not said.pop("written") and said.pop("output") == str(built / "out")
    assert said == {key: manifest[key] for key in ("splits", "groups", "sources")}
    again = json.loads(gengram_data("build", built / "data.yaml", "--json", "--overwrite").stdout)
    assert again.pop("written") and again["groups"] == said["groups"]


def test_keys_of_a_data_config():
    every = rows_of(gengram_data("build", "--keys").stdout)
    assert set(every) == {key.name for key in Keys(DataConfig).with_entries()}
    assert every["seq_length"]["default"] == "(required)"
    some = rows_of(gengram_data("build", "--keys", "seed", "groups.human.weight").stdout)
    assert {name: row["default"] for name, row in some.items()} == {
        "seed": "1234",
        "groups.NAME.weight": "1",
    }
    (key,) = json.loads(gengram_data("build", "--keys", "validation", "--json").stdout)
    assert (key["key"], key["default"]) == ("validation", 0.05)
    wrong = gengram_data("build", "--keys", "sed")
    assert isinstance(wrong.exception, UserError) and "seed" in str(wrong.exception)
    assert isinstance(gengram_data("build").exception, UserError)


def test_help_shows_a_whole_config():
    text = inspect.getdoc(build_command.build)
    example = textwrap.dedent(text.split("\b\n")[1].split("\n\n")[0])
    DataConfig.model_validate(yaml.safe_load(example))

    def names(value: object) -> set[str]:
        return (
            set(value) | {n for v in value.values() for n in names(v)}
            if isinstance(value, dict)
            else set()
        )

    keys = {key.name.rpartition(".")[2] for key in Keys(DataConfig).with_entries()}
    assert keys - names(yaml.safe_load(example)) == set()
    shown = gengram_data("build", "--help").stdout
    assert all(line in shown for line in example.splitlines())


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("configs/smoke/cpu.yaml", "gengram train"),
        ("configs/data/download/set1.yaml", "gengram-data download"),
    ],
)
def test_a_build_of_another_kind_of_config(name, command):
    error = gengram_data("build", ROOT / name).exception
    assert isinstance(error, UserError)
    assert len(str(error).splitlines()) == 1 and f"`{command} {ROOT / name}`" in str(error)


def test_a_folder_that_is_no_data_set_is_named_in_full(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    for command in ("inspect", "verify"):
        for folder in ("nowhere", "empty"):
            error = gengram_data(command, folder).exception
            assert isinstance(error, UserError) and f"{tmp_path / folder} " in str(error).replace(
                ";", " "
            )
