"""gengram-data verify: a sound data set passes, and each kind of damage is named."""

import hashlib
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_prep import cli
from data_prep.manifest import file_facts
from gengram_megatron.tokenizer import EOD

CONFIG = """\
output: out
seq_length: 8
validation: 0.25
max_n_fraction: 0.5
reverse_complement: 0.5
groups:
  human:
    sources:
      a: {fasta: a.fa}
  apes:
    sources:
      b: {fasta: b.fa}
      c: {fasta: c.fa}
"""
Damage = Callable[[Path], None]


def random_text(length: int, seed: int) -> str:
    return "".join(np.random.default_rng(seed).choice([*"ACGTacgt" * 4, *"NR"], length))


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
        Path("a.fa").write_text(f">chr1\n{random_text(1001, 1)}\n>chr2\n{random_text(500, 9)}\n")
        texts = {f"s{i}": random_text(30 + i, i + 2) for i in range(9)}
        Path("b.fa").write_text("".join(f">{name} x\n{text}\n" for name, text in texts.items()))
        Path("c.fa").write_text(f">chrX\n{random_text(600, 50)}\n>chrY\n{random_text(7, 51)}\n")
        assert run(patch, "build", "data.yaml") == 0
    return folder


@pytest.fixture
def copy(built, tmp_path, monkeypatch) -> Path:
    """A copy of it, which is also the current folder."""
    for path in [*built.glob("*.*"), *built.glob("out/*")]:
        target = tmp_path / path.relative_to(built)
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(path.read_bytes())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def problems(monkeypatch, capsys, *words: str) -> list[str]:
    """The sentences that verify prints of `out`, without the last one; it must fail."""
    capsys.readouterr()
    assert run(monkeypatch, "verify", "out", *words) == 1
    *listed, last = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"out has \d+ problems?(, .* not listed)?", last)
    return listed


def change(path: Path, edit: Callable[[bytearray], None]) -> None:
    data = bytearray(path.read_bytes())
    edit(data)
    path.write_bytes(data)


def change_manifest(edit: Callable[[dict], None]) -> None:
    path = Path("out/manifest.json")
    manifest = json.loads(path.read_text())
    edit(manifest)
    path.write_text(json.dumps(manifest))


def change_knowingly(name: str, edit: Callable[[bytearray], None]) -> None:
    """Change a file and its checksum in the manifest too, so that only its sense is wrong."""
    path = Path("out") / name
    change(path, edit)
    change_manifest(lambda manifest: manifest["files"].update({name: file_facts(path)}))


def change_origins(edit: Callable[[np.ndarray], None]) -> None:
    origins = np.load("out/train.origins.npy")
    edit(origins)
    np.save("out/train.origins.npy", origins)
    change_knowingly("train.origins.npy", lambda data: None)


def test_a_sound_data_set(copy, monkeypatch, capsys):
    assert run(monkeypatch, "verify", "out") == 0
    assert re.fullmatch(
        r"out is as its manifest says: read .* kB in .* s\n", capsys.readouterr().out
    )
    assert run(monkeypatch, "verify", "out", "--against-sources", "data.yaml") == 0
    assert ", and 2,414 bases of its sources in" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name", ["train.bin", "validation.idx", "train.origins.npy", "records.tsv"]
)
def test_one_bit_of_any_file(copy, monkeypatch, capsys, name):
    size = (copy / "out" / name).stat().st_size
    for place in {0, size // 2, size - 1}:
        change(
            copy / "out" / name, lambda data, place=place: data.__setitem__(place, data[place] ^ 1)
        )
        found = problems(monkeypatch, capsys)
        checksum = f"out/{name}: the checksum of its content is not the one in manifest.json"
        assert checksum in found
        change(
            copy / "out" / name, lambda data, place=place: data.__setitem__(place, data[place] ^ 1)
        )
    assert run(monkeypatch, "verify", "out") == 0


@pytest.mark.parametrize("name", ["train.bin", "train.idx", "train.origins.npy", "records.tsv"])
@pytest.mark.parametrize("kept", [0, 1, -1])
def test_a_file_that_was_cut_off(copy, monkeypatch, capsys, name, kept):
    path = Path("out") / name
    whole = path.stat().st_size
    change(path, lambda data: data.__delitem__(slice(kept, None)))
    found = problems(monkeypatch, capsys, "--against-sources", "data.yaml")
    assert f"out/{name} has {path.stat().st_size:,} bytes and should have {whole:,}" in found
    assert found[-1].startswith("the bases were not compared") == (name != "train.idx")


@pytest.mark.parametrize("name", ["train.bin", "validation.idx", "validation.origins.npy"])
def test_a_file_that_is_missing(copy, monkeypatch, capsys, name):
    (copy / "out" / name).unlink()
    assert problems(monkeypatch, capsys) == [f"out/{name} is missing"]


def test_files_of_two_splits_swapped(copy, monkeypatch, capsys):
    Path("out/train.bin").rename("out/kept")
    Path("out/validation.bin").rename("out/train.bin")
    Path("out/kept").rename("out/validation.bin")
    found = "\n".join(problems(monkeypatch, capsys))
    for name in ("train", "validation"):
        assert re.search(rf"out/{name}\.bin has .* bytes and should have", found)
        assert re.search(rf"out/{name}\.bin holds .* documents of 9 tokens, but", found)


def token(place: int, value: int) -> Callable[[bytearray], None]:
    return lambda data: data.__setitem__(place, value)


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (token(9 * 4 + 2, 3), "document 4 with tokens that are neither one of ACGTN nor EOD"),
        (token(9 * 5 + 2, EOD), "document 5 with EOD before the end"),
        (token(9 * 6 + 8, 5), "document 6 without EOD at the end"),
    ],
)
def test_tokens_that_may_not_be(copy, monkeypatch, capsys, edit, sentence):
    change_knowingly("train.bin", edit)
    assert problems(monkeypatch, capsys) == [f"out/train.bin: {sentence}"]


def test_many_documents_with_one_fault_are_one_sentence(copy, monkeypatch, capsys):
    change_knowingly("train.bin", lambda data: data.__setitem__(slice(8, None, 9), data[::9]))
    (found,) = problems(monkeypatch, capsys)
    assert re.search(r"train\.bin: \d{3} documents 0, 1, 2, \.\.\. without EOD", found)


@pytest.mark.parametrize(
    ("place", "sentence"),
    [
        (9, "its first bytes are not those of an index"),
        (17, "its first bytes are not those of an index"),
        (34 + 4 * 7, "the length of document 7 is wrong"),
        (-8, "the first sequence of document"),
    ],
)
def test_an_index_that_says_something_else(copy, monkeypatch, capsys, place, sentence):
    change_knowingly("train.idx", lambda data: data.__setitem__(place, data[place] ^ 2))
    (found,) = problems(monkeypatch, capsys)
    assert sentence in found


def test_an_index_that_goes_on(copy, monkeypatch, capsys):
    change_knowingly("train.idx", lambda data: data.extend(b"12345678"))
    assert problems(monkeypatch, capsys) == ["out/train.idx has more data after the last document"]


def set_field(field: str, row: int, value) -> Callable[[np.ndarray], None]:
    return lambda origins: origins[field].__setitem__(row, value)


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (
            set_field("start", 3, 1),
            "document 3 at a position that is not on the grid of a sequence",
        ),
        (set_field("start", 3, 8 << 40), "document 3 at a position that is not on the grid"),
        (set_field("record", 3, 99), "document 3 at a position that is not on the grid"),
        (
            lambda own: own.__setitem__(4, own[3]),
            "document 4 at a position that another document has",
        ),
        (
            lambda own: own.__setitem__([7, 8], own[[8, 7]]),
            "document 8 not in the order of the sources",
        ),
        (
            lambda own: own["strand"].__setitem__(5, b"-" if own["strand"][5] == b"+" else b"+"),
            "document 5 not on the strand that the seed draws for its position",
        ),
    ],
)
def test_origins_that_cannot_be(copy, monkeypatch, capsys, edit, sentence):
    change_origins(edit)
    found = problems(monkeypatch, capsys, "--against-sources", "data.yaml")
    assert any(sentence in problem for problem in found), found
    assert found[-1].startswith("the bases were not compared with the sources")


def test_a_fragment_in_both_splits(copy, monkeypatch, capsys):
    held = np.load("out/validation.origins.npy")
    change_origins(lambda origins: origins.__setitem__(0, held[0]))
    found = problems(monkeypatch, capsys)
    assert any("split validation: document 0 at a position that another" in one for one in found)


def test_fragments_of_another_source(copy, monkeypatch, capsys):
    """The last document of human/a is said to be of the first sequence of apes/b."""
    own = np.load("out/train.origins.npy")
    last = int(np.flatnonzero(own["record"] < 2)[-1])
    change_origins(lambda origins: origins.__setitem__(last, (2, 0, b"+")))
    found = "\n".join(problems(monkeypatch, capsys))
    for source in ("human/a", "apes/b"):
        assert re.search(rf"split train has \d+ fragments of source {source}, but", found)


@pytest.mark.parametrize(
    ("keys", "value", "sentence"),
    [
        (("splits", "train", "tokens"), 5, "tokens of split train are not those of its fragments"),
        (("splits", "train", "fragments"), 5, "fragments of split train are not the sum of"),
        (("splits", "train", "fragments"), 5, r"train\.bin holds \d+ documents of 9 tokens, but"),
        (("sources", "apes/b", "train"), 5, r"train has \d+ fragments of source apes/b, but .* 5"),
        (("sources", "apes/b", "train"), 5, "train of group apes is not the sum of its sources'"),
        (("sources", "apes/b", "train"), 5, "of source apes/b does not sum to their number"),
        (("sources", "apes/b", "bases"), 5, "fragments and remainder of source apes/b do not sum"),
        (("sources", "apes/b", "records"), 5, r"has 9 sequences of source apes/b with 306 bases"),
        (("sources", "apes/b", "composition", "A"), 5, "composition of source apes/b does not sum"),
        (("groups", "apes", "train_tokens"), 5, "train_tokens of group apes are not those of"),
        (("settings", "seed"), 5, "not on the strand that the seed draws"),
        (("tokens", "EOD"), 5, "not those of this version's tokenizer"),
        (("files", "train.bin", "sha256"), "0", r"train\.bin: the checksum of its content"),
    ],
)
def test_a_manifest_that_was_altered(copy, monkeypatch, capsys, keys, value, sentence):
    def alter(manifest: dict) -> None:
        *way, last = keys
        for key in way:
            manifest = manifest[key]
        manifest[last] = value

    change_manifest(alter)
    assert re.search(sentence, "\n".join(problems(monkeypatch, capsys)))


def test_a_manifest_that_lists_too_little(copy, monkeypatch, capsys):
    change_manifest(lambda manifest: manifest["files"].pop("train.idx"))
    assert problems(monkeypatch, capsys) == ["the manifest of out lists no train.idx"]


def test_a_base_that_is_not_that_of_the_source(copy, monkeypatch, capsys):
    """A, C, G and T are all legal: only the FASTA can tell."""

    def swap(data: bytearray) -> None:
        place = 9 * 11 + 3
        data[place] = 5 if data[place] == 6 else 6

    change_knowingly("validation.bin", swap)
    assert run(monkeypatch, "verify", "out") == 0
    (found,) = problems(monkeypatch, capsys, "--against-sources", "data.yaml")
    assert found.startswith("split validation: document 11 with other bases than ")


def test_a_strand_that_is_told_wrong_everywhere(copy, monkeypatch, capsys):
    """Tokens turned against what origins and seed say: found in the sources only."""

    def turn(data: bytearray) -> None:
        documents = np.frombuffer(data, dtype=np.uint8).reshape(-1, 9)
        pairs = np.arange(13, dtype=np.uint8)
        pairs[[5, 6, 7, 8]] = [6, 5, 8, 7]
        documents[:, :8] = pairs[documents[:, 7::-1]]

    change_knowingly("train.bin", turn)
    found = problems(monkeypatch, capsys, "--against-sources", "data.yaml")[0]
    assert re.search(
        r"split train: \d+ documents 0, 1, 2, \.\.\. with other bases than a\.fa", found
    )


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        (
            ">chr1\nACGTACGTA\n",
            [
                "is not the file that human/a was built from",
                "a.fa has sequence chr1 of 9 bases where",
            ],
        ),
        (">chr1\nMKLVFF\n", ["is not the file that human/a", "not DNA"]),
    ],
)
def test_sources_that_changed(copy, monkeypatch, capsys, text, sentences):
    Path("a.fa").write_text(text)
    found = problems(monkeypatch, capsys, "--against-sources", "data.yaml")
    assert len(found) == len(sentences)
    for sentence, problem in zip(sentences, found):
        assert sentence in problem


def test_a_source_that_goes_on(copy, monkeypatch, capsys):
    with Path("a.fa").open("a") as file:
        file.write(">chr3\nACGT\n")
    found = problems(monkeypatch, capsys, "--against-sources", "data.yaml")
    assert "has sequence chr3 of 4 bases where the data set has no further sequence" in found[-1]


def test_more_problems_than_are_listed(copy, monkeypatch, capsys):
    for name in ("train.bin", "train.idx", "records.tsv"):
        Path("out", name).unlink()
    assert len(problems(monkeypatch, capsys, "--limit", "2")) == 2
    run(monkeypatch, "verify", "out", "--limit", "2")
    assert "out has 3 problems, 1 of them not listed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda manifest: manifest.update(format=1), "has format 1; this version reads format"),
        (lambda manifest: manifest.pop("splits"), r"is damaged \(splits: field required\)"),
        (lambda manifest: manifest["settings"].update(seq_length="x"), r"settings\.seq_length: "),
        (lambda manifest: manifest.pop("format"), "is damaged; build the data set again"),
    ],
)
def test_a_manifest_that_cannot_be_used(copy, monkeypatch, capsys, damage, sentence):
    change_manifest(damage)
    assert run(monkeypatch, "verify", "out") == 2
    shown = capsys.readouterr().err
    assert re.search(sentence, shown) and len(shown.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["nowhere"], "nowhere; gengram-data build makes data sets"),
        (["."], "is not a data set: it has no manifest.json"),
        (["out", "--against-sources", "other.yaml"], "only one of them has the sources apes/d"),
    ],
)
def test_what_the_user_can_mend(copy, monkeypatch, capsys, words, sentence):
    Path("other.yaml").write_text(CONFIG + "      d: {fasta: a.fa}\n")
    assert run(monkeypatch, "verify", *words) == 2
    assert sentence in capsys.readouterr().err


def test_verify_changes_nothing(copy, monkeypatch):
    def digests() -> dict[str, str]:
        return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in Path("out").iterdir()}

    before = digests()
    run(monkeypatch, "verify", "out", "--against-sources", "data.yaml")
    assert digests() == before
