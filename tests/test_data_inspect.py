"""gengram-data inspect: what it says of a data set is what a slow reading of it finds."""

import json
import re
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from data_prep import cli
from data_prep.fragment import Fate
from data_prep.inspect.opened import Counts
from tests.origins import Origins

LENGTH = 16
CONFIG = f"""\
output: out
seq_length: {LENGTH}
validation: 0.25
max_n_fraction: 0.5
reverse_complement: 0.5
gene_distance: 40
groups:
  human:
    sources:
      a: {{fasta: a.fa, annotation: a.bed}}
  apes:
    sources:
      b: {{fasta: b.fa, without_annotation: keep}}
      c: {{fasta: c.fa, without_annotation: keep}}
"""
LETTERS = {8: "A", 5: "C", 6: "G", 7: "T", 9: "N"}
PAIRS = {"A": "T", "C": "G", "G": "C", "T": "A", "N": "N"}


def random_text(length: int, seed: int) -> str:
    return "".join(np.random.default_rng(seed).choice([*"ACGTacgt" * 2, "g", *"NNR"], length))


def run(monkeypatch, *words: str) -> int:
    """A gengram-data command in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", ["gengram-data", *words])
    try:
        cli.main()
    except SystemExit as end:
        return end.code or 0
    return 0


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with three sources, their config, and the data set `out` built from them."""
    folder = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("data.yaml").write_text(CONFIG)
        Path("a.fa").write_text(f">chr1\n{random_text(1500, 1)}\n>chr2\n{random_text(500, 9)}\n")
        Path("a.bed").write_text("chr1\t200\t900\nchr2\t100\t480\n")
        texts = {f"s{i}": random_text(70 + i, i + 2) for i in range(9)}
        Path("b.fa").write_text("".join(f">{name} x\n{text}\n" for name, text in texts.items()))
        Path("c.fa").write_text(f">chrX\n{random_text(900, 50)}\n>chrY\n{random_text(7, 51)}\n")
        assert run(patch, "build", "data.yaml") == 0
    return folder


@pytest.fixture
def here(built, monkeypatch) -> Path:
    """The same, as the current folder; its content must not be changed."""
    monkeypatch.chdir(built)
    return built


def inspected(monkeypatch, capsys, *words: str) -> dict:
    capsys.readouterr()
    assert run(monkeypatch, "inspect", "out", *words, "--json") == 0
    return json.loads(capsys.readouterr().out)


def slow_documents(split: str) -> list[tuple[str, str, str, str]]:
    """Source, sequence, strand and bases of every document of `out`."""
    tokens = Path(f"out/{split}.bin").read_bytes()
    origins = Origins(Path("out"), split, LENGTH)
    documents = []
    for number in range(len(origins)):
        own = tokens[number * (LENGTH + 1) :][:LENGTH]
        text = "".join(LETTERS[token] for token in own)
        origin = origins[number]
        documents.append((origin.source, origin.record, origin.strand, text))
    return documents


def check_part(said: dict, documents: list[tuple[str, str, str, str]]) -> None:
    """What is said of some documents, all of which were looked at."""
    text = "".join(document[3] for document in documents)
    assert said["fragments"] == said["looked_at"] == len(documents)
    strands = [document[2] for document in documents]
    assert said["strands"] == {strand: strands.count(strand) for strand in "+-"}
    for base in "ACGTN":
        assert said["composition"][base] == pytest.approx(text.count(base) / len(text))
    known = len(text) - text.count("N")
    assert said["gc"] == pytest.approx((text.count("G") + text.count("C")) / known)


def test_counts_and_composition(here, monkeypatch, capsys):
    said = inspected(monkeypatch, capsys, "--sequences")
    for split in ("train", "validation"):
        documents = slow_documents(split)
        assert said["splits"][split]["tokens"] == len(documents) * (LENGTH + 1)
        check_part(said["splits"][split], documents)
        for group in ("human", "apes"):
            own = [one for one in documents if one[0].startswith(f"{group}/")]
            check_part(said["groups"][group][split], own)
        for source in ("human/a", "apes/b", "apes/c"):
            own = [one for one in documents if one[0] == source]
            check_part(said["sources"][source][split], own)
        found = {(one["source"], one["sequence"]): one[split] for one in said["sequences"]}
        places = [document[:2] for document in documents]
        assert found == {place: places.count(place) for place in found}
        assert set(places) <= found.keys()
    assert {one["sequence"]: one["bases"] for one in said["sequences"]}["chrX"] == 900
    assert said["sources"]["human/a"]["genes"] == {"kind": "region", "count": 2}
    assert said["sources"]["human/a"]["fates"]["far_from_genes"] > 0
    assert "sequences" not in inspected(monkeypatch, capsys)


def test_bases_are_counted_in_some_fragments_over_the_whole_split(here, monkeypatch, capsys):
    said = inspected(monkeypatch, capsys, "--fragments", "10")
    whole = inspected(monkeypatch, capsys, "--fragments", "1", "--all")
    documents = slow_documents("train")
    assert len(documents) > 40
    train = said["splits"]["train"]
    assert (train["looked_at"], train["fragments"]) == (10, len(documents))
    text = "".join(documents[n * len(documents) // 10][3] for n in range(10))
    assert train["composition"]["A"] == pytest.approx(text.count("A") / len(text))
    assert whole["splits"]["train"]["looked_at"] == len(documents)
    assert whole == inspected(monkeypatch, capsys)


def test_tables_show_the_same_numbers(here, monkeypatch, capsys):
    said = inspected(monkeypatch, capsys)
    assert run(monkeypatch, "inspect", "out", "--sequences") == 0
    shown = capsys.readouterr().out
    rows = {}
    for line in shown.splitlines():
        cells = line.split("\t")
        rows.setdefault(cells[0], []).append(cells[1:])
    train, a = said["splits"]["train"], said["sources"]["human/a"]
    assert rows["train"][0][0] == f"{train['fragments']:,}"
    assert rows["train"][0][2] == f"{100 * train['strands']['-'] / train['fragments']:.2f}"
    assert rows["train"][0][7:] == [
        f"{100 * train['composition']['N']:.2f}",
        f"{100 * train['gc']:.2f}",
    ]
    trained_a, _, fates_of_a, chr1 = rows["human/a"][:4]
    assert trained_a[:3] == ["train", f"{a['train']['fragments']:,}", "50.00"]
    assert fates_of_a[:3] == ["2", "2,000", "2"] and chr1[:2] == ["chr1", "1,500"]
    assert rows["apes/b"][2][2] == "none, keep"


@pytest.mark.parametrize("split", ["train", "validation"])
def test_every_sample_is_found_again_in_the_fasta(here, monkeypatch, capsys, split):
    genome = {}
    for name in "abc":
        for block in Path(f"{name}.fa").read_text().split(">")[1:]:
            header, text = block.splitlines()
            bases = "".join(b if b in "ACGT" else "N" for b in text.upper())
            genome[f"{name}.fa", header.split()[0]] = bases
    documents = slow_documents(split)
    strands = set()
    for number in [*range(0, len(documents), 5), len(documents) - 1]:
        place = inspected(monkeypatch, capsys, "--sample", str(number), "--split", split)
        text = genome[place["fasta"], place["sequence"]]
        assert len(text) == place["sequence_bases"]
        assert place["region"] == f"{place['sequence']}:{place['start'] + 1}-{place['end']}"
        bases = text[place["start"] : place["end"]]
        if place["strand"] == "-":
            bases = "".join(PAIRS[base] for base in reversed(bases))
        assert bases == place["first_bases"] == place["last_bases"] == documents[number][3]
        assert (place["sample"], place["split"], place["source"][-1]) == (
            number,
            split,
            place["fasta"][0],
        )
        strands.add(place["strand"])
    assert strands == {"+", "-"}


def test_a_sample_as_a_table(here, monkeypatch, capsys):
    place = inspected(monkeypatch, capsys, "--sample", "3")
    assert place["split"] == "train"
    assert run(monkeypatch, "inspect", "out", "--sample", "3") == 0
    shown = capsys.readouterr().out
    assert f"{place['start']} to {place['end']} (from 0, half-open, forward strand)" in shown
    assert f"{place['region']} (from 1, both ends included)" in shown
    assert place["first_bases"] in shown and f"{place['source']} ({place['fasta']})" in shown


def test_the_report_is_a_picture(here, monkeypatch, capsys, tmp_path):
    from matplotlib.image import imread

    out = tmp_path / "report.png"
    assert run(monkeypatch, "inspect", "out", "--report", str(out)) == 0
    assert f"wrote {out}" in capsys.readouterr().out
    picture = imread(out)
    assert picture.shape == (960, 1680, 4)
    assert 0.01 < np.mean(picture[..., :3].min(axis=-1) < 0.5) < 0.5  # neither blank nor filled
    assert [path.name for path in tmp_path.iterdir()] == ["report.png"]


@pytest.mark.parametrize(
    "groups",
    [{"all": 1}, {"human": 1, "apes": 3}, {"human": 2, "apes": 45}, {f"g{i}": 2 for i in range(9)}],
)
def test_no_legend_of_the_report_hides_a_bar_and_no_text_another(tmp_path, monkeypatch, groups):
    from data_prep.inspect import picture
    from data_prep.inspect.contents import contents, describe
    from data_prep.inspect.opened import DataSet

    monkeypatch.chdir(tmp_path)
    config = {"output": "set", "seq_length": LENGTH, "validation": 0.1, "groups": {}}
    for group, count in groups.items():
        config["groups"][group] = {"sources": {}}
        for number in range(count):
            name = f"GCA_{number:09}_{group}"
            text = random_text(LENGTH * (60 + 3 * number), 100 * len(config["groups"]) + number)
            Path(f"{name}.fa").write_text(f">c\n{text}\n")
            config["groups"][group]["sources"][name] = {"fasta": f"{name}.fa"}
    Path("set.yaml").write_text(json.dumps(config))
    assert run(monkeypatch, "build", "set.yaml") == 0
    data = DataSet(Path("set"))
    found = contents(data, None, lambda count: None)
    figure = picture.page(data, describe(data, found, False), found)
    figure.draw_without_rendering()
    legends = [*figure.legends, *(axes.get_legend() for axes in figure.axes)]
    boxes = [legend.get_window_extent() for legend in legends if legend is not None]
    assert len(boxes) == 3
    for axes in figure.axes:
        bars = [patch.get_window_extent() for patch in axes.patches]
        assert bars and not any(box.overlaps(bar) for box in boxes for bar in bars)
        for ticks in (axes.get_xticklabels(), axes.get_yticklabels()):
            labels = [label.get_window_extent() for label in ticks if label.get_text()]
            assert not any(one.overlaps(other) for one, other in pairwise(labels))
        title = axes.title.get_window_extent()
        assert figure.bbox.x0 <= title.x0 and title.x1 <= figure.bbox.x1
        if axes.yaxis_inverted():  # horizontal bars: a single one does not fill the page
            assert max(bar.height for bar in bars) < 0.15 * figure.bbox.height


def test_distributions_in_the_report(here, monkeypatch, tmp_path):
    """The curves hold every fragment looked at, at its own share."""
    from data_prep.inspect import picture
    from data_prep.inspect.contents import contents
    from data_prep.inspect.opened import DataSet

    data = DataSet(Path("out"))
    bases = picture._bases_by_group(data, contents(data, None, lambda count: None))
    documents = slow_documents("train") + slow_documents("validation")
    for group, rows in bases.items():
        texts = [text for source, _, _, text in documents if source.startswith(f"{group}/")]
        assert sorted(rows[:, -1] / LENGTH) == sorted(text.count("N") / LENGTH for text in texts)
        shares = [
            (text.count("G") + text.count("C")) / (LENGTH - text.count("N")) for text in texts
        ]
        assert np.allclose(sorted(picture._gc(rows)), sorted(shares))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["nowhere"], "there is no folder .*nowhere; gengram-data build makes data sets"),
        (["."], ". is not a data set: it has no manifest.json"),
        (["out", "--sample", "9999"], r"no sample 9999 in split train of out; it has samples 0 to"),
        (["out", "--sample", "-1"], "there is no sample -1 in split train"),
        (
            ["out", "--sample", "1", "--split", "test"],
            "no split test; its splits are train and val",
        ),
        (["out", "--split", "train"], "--split needs --sample"),
        (["out", "--sample", "1", "--all"], "--sample shows only one sample; leave out --report"),
        (["out", "--report", "train.bin"], r"train\.bin: the name must end in \.png"),
        (["out", "--report", "no/a.png"], r"no/a\.png: there is no folder no"),
    ],
)
def test_what_the_user_can_mend(here, monkeypatch, capsys, words, sentence):
    assert run(monkeypatch, "inspect", *words) == 2
    shown = capsys.readouterr().err
    assert re.search(sentence, shown) and "Traceback" not in shown


def damaged(folder: Path, built: Path) -> Path:
    """A copy of the data set to damage."""
    (folder / "out").mkdir()
    for path in (built / "out").iterdir():
        (folder / "out" / path.name).write_bytes(path.read_bytes())
    return folder / "out"


@pytest.mark.parametrize(
    ("name", "data", "sentence"),
    [
        ("train.bin", None, r"train\.bin is missing; copy or build the data set again"),
        ("train.bin", b"x", r"train\.bin has 1 bytes and should have"),
        ("records.tsv", None, r"records\.tsv is missing"),
        ("train.origins.npy", None, r"train\.origins\.npy is missing"),
        ("manifest.json", b"{", r"manifest\.json is damaged; build the data set again"),
        ("manifest.json", b'{"format": 1}', "has format 1; this version reads format"),
        ("manifest.json", b'{"format": 2}', r"is damaged \(settings: field required\)"),
    ],
)
@pytest.mark.parametrize("words", [[], ["--sample", "0"]])
def test_a_damaged_data_set(built, monkeypatch, capsys, tmp_path, name, data, sentence, words):
    path = damaged(tmp_path, built) / name
    path.unlink() if data is None else path.write_bytes(data)
    assert run(monkeypatch, "inspect", str(path.parent), *words) == 2
    shown = capsys.readouterr().err
    assert re.search(sentence, shown) and len(shown.splitlines()) == 1


def test_origins_that_do_not_fit(built, monkeypatch, capsys, tmp_path):
    out = damaged(tmp_path, built)
    origins = np.load(out / "train.origins.npy")
    origins["record"][0] = 99
    np.save(out / "train.origins.npy", origins)
    assert run(monkeypatch, "inspect", str(out)) == 2
    assert "1 fragments of split train are of sequences that records.tsv" in capsys.readouterr().err
    assert run(monkeypatch, "inspect", str(out), "--sample", "0") == 2
    assert "sample 0 of train is of sequence 99" in capsys.readouterr().err
    size = (out / "train.origins.npy").stat().st_size
    for start in (b"x", b"PK\x03\x04"):  # the second is that of an archive, which np.load opens
        (out / "train.origins.npy").write_bytes(start.ljust(size, b"x"))
        assert run(monkeypatch, "inspect", str(out)) == 2
        assert "it is not a table of origins" in capsys.readouterr().err


def test_counts_of_a_manifest_have_every_fate() -> None:
    assert {fate.name.lower() for fate in Fate} <= set(Counts.model_fields)
