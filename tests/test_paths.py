"""Where relative paths of configs begin: at the file that names an input, at the current folder for
what the commands write; and what is said of a data set that is not there."""

from pathlib import Path

import pytest

from data_prep.download.schema import DownloadConfig
from data_prep.schema import DataConfig
from data_prep.sources import inputs
from gengram_megatron.config.load import dump_config, load_config
from gengram_megatron.config.schema import Config
from gengram_megatron.data_set import check_data_sets_exist
from gengram_megatron.errors import UserError
from tests.test_config_cli import gengram
from tests.training.tiny import write_config


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """The current folder: one with the config of a run and, elsewhere, those of data sets."""
    monkeypatch.chdir(tmp_path)
    for folder in ("runs_of_mine", "shared", "configs/data"):
        (tmp_path / folder).mkdir(parents=True)
    write_config(tmp_path / "shared/tiny.yaml", Path("datasets/tiny"))
    Path("runs_of_mine/run.yaml").write_text("base: ../shared/tiny.yaml\nrun: {dir: runs/a}\n")
    return tmp_path


def test_an_input_is_relative_to_the_file_that_names_it(here):
    run = here / "runs_of_mine/run.yaml"
    with (here / "shared/tiny.yaml").open("a") as base:
        base.write("\n")
    text = (here / "shared/tiny.yaml").read_text()
    (here / "shared/tiny.yaml").write_text(
        text.replace("workers:", "tokenizer: dna.model\n  workers:")
    )
    loaded = load_config(Path("runs_of_mine/run.yaml"), [], Config)
    assert loaded.data.tokenizer == str(here / "shared/dna.model")
    assert load_config(run, ["data.tokenizer=b.model"], Config).data.tokenizer == str(
        here / "b.model"
    )
    run.write_text(run.read_text() + "data: {tokenizer: ../c.model}\n")
    assert load_config(run, [], Config).data.tokenizer == str(here / "c.model")
    copy = here / "configs/copy.yaml"  # as in a run's folder
    copy.write_text(dump_config(loaded))
    assert load_config(copy, [], Config) == loaded


def test_what_commands_write_is_relative_to_the_current_folder(here):
    loaded = load_config(here / "runs_of_mine/run.yaml", ["checkpoint.load=runs/b"], Config)
    paths = (loaded.run.dir, loaded.data.path, loaded.checkpoint.load)
    assert paths == ("runs/a", "datasets/tiny", "runs/b")


DATA = "output: {}\nseq_length: 64\ngroups: {{all: {{sources: {{one: {{fasta: one.fa}}}}}}}}\n"


@pytest.mark.parametrize("place", ["configs/data", "runs_of_mine", "."])
def test_a_missing_data_set_says_what_would_build_it(here, place):
    build = Path(place) / "dna.yaml"
    build.write_text(DATA.format("datasets/tiny"))
    (build.parent / "other.yaml").write_text(DATA.format("datasets/other"))
    (build.parent / "broken.yaml").write_text("output: [")
    path = Path("runs_of_mine/run.yaml")
    with pytest.raises(UserError) as error:
        check_data_sets_exist(load_config(path, [], Config), path)
    assert str(error.value).startswith("data.path: ")
    assert str(here / "datasets/tiny") in str(error.value)
    assert f"`gengram-data build {build}`" in str(error.value)
    blend = "data={path: null, blend: [{path: datasets/tiny, weight: 1}, {path: b, weight: 1}]}"
    with pytest.raises(UserError) as error:
        check_data_sets_exist(load_config(path, [blend], Config), path)
    first, second = str(error.value).splitlines()
    assert first.startswith("data.blend entry 1.path: ") and str(build) in first
    assert second.startswith("data.blend entry 2.path: ") and str(build) not in second
    (here / "datasets/tiny").mkdir(parents=True)
    check_data_sets_exist(load_config(path, [], Config), path)


def test_train_says_so_before_it_starts(here):
    run = here / "runs_of_mine/run.yaml"
    done = gengram("train", run, f"data.path={here / 'nowhere'}")
    assert done.returncode == 2 and f"there is no folder {here / 'nowhere'}" in done.stderr


def test_genomes_are_relative_to_the_file_that_names_them(here):
    base = Path("shared/data.yaml")
    base.write_text(DATA.format("datasets/tiny").replace("one.fa", "one.fa, annotation: one.gtf"))
    config = Path("configs/data/mine.yaml")
    two = "two: {fasta: two.fa}, three: {fasta: /abs/three.fa}"
    config.write_text(f"base: ../../shared/data.yaml\ngroups: {{all: {{sources: {{{two}}}}}}}\n")
    words = ["groups.all.sources.one.chromosomes=names.txt", "gene_distance=1"]
    words += ["without_annotation=keep"]
    sources = load_config(config, words, DataConfig).groups["all"].sources
    folder = here / "configs/data"
    assert (folder / sources["one"].fasta).resolve() == here / "shared/one.fa"
    assert (folder / sources["one"].annotation).resolve() == here / "shared/one.gtf"
    assert (folder / sources["one"].chromosomes).resolve() == here / "names.txt"
    assert not Path(sources["one"].fasta).is_absolute()  # the manifest names no machine's folders
    assert (sources["two"].fasta, sources["three"].fasta) == ("two.fa", "/abs/three.fa")
    tables = "output: a\nindexes: {b: {table: https://example.org/a.csv}, c: {table: d.csv}}\n"
    base.write_text(tables)
    config.write_text("base: ../../shared/data.yaml\n")
    indexes = load_config(config, [], DownloadConfig).indexes
    assert indexes["b"].table == "https://example.org/a.csv"
    assert (folder / indexes["c"].table).resolve() == here / "shared/d.csv"


def test_a_missing_genome_is_named_in_full(here):
    path = Path("configs/data/dna.yaml")
    path.write_text(DATA.format("datasets/tiny").replace("one.fa", "../genomes/one.fa"))
    with pytest.raises(UserError, match=str(here / "configs/genomes/one.fa")):
        inputs(load_config(path, [], DataConfig), path.parent)
