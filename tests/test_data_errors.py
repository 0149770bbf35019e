"""What can go wrong with the input: one sentence, exit code 2, and nothing left behind."""

import gzip
import json
import os
import re
import socket
import sys
from pathlib import Path

import pytest

from data_prep import cli

GOOD = b">r1\n" + b"ACGTACGTAC\n" * 20 + b">r2\n" + b"GATTACAGAT\n" * 20
CONFIG = """\
output: out
seq_length: 16
validation: 0.25
workers: 1
groups:
  human:
    sources:
      a: {fasta: good.fa}
  apes:
    sources:
      b: {fasta: BAD}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder with a good source and a config that wants a second one, bad.fa."""
    monkeypatch.chdir(tmp_path)
    Path("good.fa").write_bytes(GOOD)
    Path("data.yaml").write_text(CONFIG.replace("BAD", "bad.fa"))
    return tmp_path


def run(monkeypatch, *words: str, config: str = "data.yaml") -> int:
    """`gengram-data build CONFIG ...` in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", ["gengram-data", "build", config, *words])
    try:
        cli.main()
    except SystemExit as end:
        return end.code or 0
    return 0


def check_refused(capsys, code: int, message: str) -> None:
    """One sentence that has the message, and no output; what was found out about the good source
    may be kept."""
    shown = capsys.readouterr()
    assert code == 2, shown
    assert re.search(message, shown.err), shown.err
    assert len(shown.err.splitlines()) == 1 and "Traceback" not in shown.err
    assert {path.name for path in Path().glob("out*")} <= {"out.building"}


BAD = {
    "truncated gzip": (gzip.compress(GOOD)[:-12], "cannot be decompressed"),
    "RNA": (b">r\n" + b"ACGUACGU\n" * 20, "record r looks like RNA .* the letter U"),
    "bases after a header that was cut": (b">r1", "record r1 has no bases"),
    "empty": (b"", "bad.fa is empty"),
    "empty when unpacked": (gzip.compress(b""), "bad.fa is empty"),
    "lines of old Macs": (b">r1 one\rACGT\rACGT\r", "carriage return alone, as on old Macs"),
    "byte-order mark": (b"\xef\xbb\xbf" + GOOD, "begins with a byte-order mark"),
    "record without bases": (GOOD + b">r3\n>r4\nACGT\n", "record r3 has no bases"),
    "record without a name": (b">\n" + GOOD, "record 1 has no name"),
    "only N": (b">r1\n" + b"N" * 500, "contains only N"),
    "duplicate names": (GOOD + b">r1 again\nACGT\n", "two records are named r1"),
    "protein": (b">p\nMKVLAAGIVGLLLAQWERTYIPASDFGHKLCVNM\n", "not DNA: in record p, 'L' at"),
    "alignment": (b">r\nACGT--ACGT\n", "not DNA: in record r, '-' at position 5"),
    "FASTQ": (b"@r1\nACGT\n+\nIIII\n", "is not a FASTA file: it begins with '@r1"),
    "bases without a header": (
        b"ACGTACGT\n",
        "is not a FASTA file: it begins with 'ACGTACGT', not '>'",
    ),
    "binary": (bytes(range(256)) * 20, "is not a FASTA file"),
    "shorter than seq_length": (b">r1\nACGTACGTACGTACG\n", "15 bases, fewer than seq_length"),
    "nothing left after filters": (
        b">r1\n" + b"ACGNNNNNNNNNNNNN" * 30,
        "group apes has 0 fragments for the train split .* dropped for too many N",
    ),
    "the same file twice": (GOOD, "human/a and apes/b are the same file"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_sources(folder, monkeypatch, capsys, kind):
    data, message = BAD[kind]
    Path("bad.fa").write_bytes(data)
    check_refused(capsys, run(monkeypatch), message)
    Path("bad.fa").write_bytes(GOOD.replace(b"GATTACA", b"CATTACA"))
    assert run(monkeypatch) == 0  # nothing of the bad file was kept
    assert not Path("out.building").exists()


def test_gzip_by_its_name_only(folder, monkeypatch, capsys):
    Path("bad.fa.gz").write_bytes(GOOD)
    code = run(monkeypatch, "groups.apes.sources.b.fasta=bad.fa.gz")
    check_refused(
        capsys, code, r"bad\.fa\.gz is not compressed with gzip, although its name says so"
    )


def test_an_error_of_one_worker_is_the_error_of_all(folder, monkeypatch, capsys):
    Path("bad.fa").write_bytes(b">p\nMKVLAAGIVGLLLAQWERTYIPASDFGHKLCVNM\n")
    check_refused(capsys, run(monkeypatch, "--workers", "2"), "this is not DNA: in record p, 'L'")


def test_nothing_left_for_a_split(folder, monkeypatch, capsys):
    Path("bad.fa").write_bytes(GOOD.replace(b"GATTACA", b"CATTACA"))
    records = re.findall(rb">(\S+)", GOOD)
    names = ",".join(name.decode() for name in records)
    code = run(monkeypatch, f"groups.apes.sources.b.validation_records=[{names}]")
    check_refused(
        capsys, code, r"apes has 0 fragments for the train split .* \d+ are in the validation split"
    )


def test_a_missing_source(folder, monkeypatch, capsys):
    check_refused(capsys, run(monkeypatch), r"bad\.fa: there is no such file \(source apes/b\)")
    Path("bad.fa").mkdir()
    check_refused(capsys, run(monkeypatch), r"bad\.fa: it is a folder \(source apes/b\)")


@pytest.mark.parametrize("key", ["fasta", "annotation"])
def test_a_source_that_can_be_read_only_once(folder, monkeypatch, capsys, key):
    Path("bad.fa").write_bytes(GOOD)
    os.mkfifo("pipe")
    end, other = os.pipe()
    with socket.socket(socket.AF_UNIX) as own:
        own.bind("socket")
        kinds = {"pipe": "a pipe", f"/dev/fd/{end}": "a pipe", "/dev/null": "a device"}
        for path, kind in {**kinds, "socket": "a socket"}.items():
            words = [f"groups.apes.sources.b.{key}={path}", "gene_distance=5"]
            message = f"{path}: it is {kind}.* more than once; .* file \\(source apes/b\\)"
            check_refused(capsys, run(monkeypatch, *words, "without_annotation=keep"), message)
    os.close(end)
    os.close(other)


def test_bytes_after_the_compressed_data_are_ignored_and_told(folder, monkeypatch, capsys):
    Path("bad.fa.gz").write_bytes(gzip.compress(GOOD.replace(b"GATTACA", b"CATTACA")) + b"abc")
    Path("bad.bed.gz").write_bytes(gzip.compress(b"r1 0 9\nr2 0 9\n") + b"ab")
    words = ["groups.apes.sources.b.fasta=bad.fa.gz", "gene_distance=500"]
    words += ["without_annotation=keep", "groups.apes.sources.b.annotation=bad.bed.gz"]
    assert run(monkeypatch, *words) == 0
    said = capsys.readouterr().err.splitlines()
    for path, count in (("bad.fa.gz", 3), ("bad.bed.gz", 2)):
        assert any(path in line and f"{count} bytes after" in line for line in said)
    facts = json.loads(Path("out/manifest.json").read_text())["sources"]
    assert facts["apes/b"]["bytes_after_compressed_data"] == {"fasta": 3, "annotation": 2}
    assert "bytes_after_compressed_data" not in facts["human/a"]
    assert run(monkeypatch, *words) == 0
    assert "out is up to date" in capsys.readouterr().out


def test_sources_are_relative_to_the_config(folder, monkeypatch, capsys):
    Path("bad.fa").write_bytes(GOOD.replace(b"GATTACA", b"CATTACA"))
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    assert run(monkeypatch, config="../data.yaml") == 0
    assert "wrote out" in capsys.readouterr().out
    assert (folder / "elsewhere/out/manifest.json").is_file()
    assert run(monkeypatch, config="../data.yaml") == 0
    assert "out is up to date" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["seq_lenght=8"], "there is no key seq_lenght; did you mean seq_length"),
        (["seq_length=0"], "seq_length is 0; it must be a whole number"),
        (["validation=1"], "validation is 1; it must be a number"),
        (["groups.apes.sources.b.validation_regions=[r9:1-4]"], "has no record r9"),
        (
            [
                "groups.apes.sources.b.validation_records=[r1]",
                "groups.apes.sources.b.validation=0.5",
            ],
            "give one of validation, validation_records, validation_regions, validation_headers",
        ),
        (["validation=0"], "for the validation split and needs at least 1"),
        (["groups.apes.weight=1000"], "needs at least 1000"),
        (["gene_distance=5"], r"gene_distance is set and groups\.human\.sources\.a has no anno"),
        (
            [
                "gene_distance=5",
                "groups.human.sources.a.annotation=no.gtf",
                "groups.apes.sources.b.without_annotation=keep",
            ],
            r"no\.gtf: there is no such file \(source human/a\)",
        ),
        (["reverse_complement=56"], "reverse_complement is 56; it must be a number"),
        (["total_tokens=20"], "total_tokens is 20; it must be at least 34, one fragment of 17"),
        (
            ["total_tokens=34000"],
            r"human has 306 tokens of 17,000 \(would be repeated 55\.56 times",
        ),
        (["output=good.fa"], "good.fa exists and is not a data set"),
    ],
)
def test_bad_settings(folder, monkeypatch, capsys, words, message):
    Path("bad.fa").write_bytes(GOOD.replace(b"GATTACA", b"CATTACA"))
    check_refused(capsys, run(monkeypatch, *words), message)


ANNOTATIONS = {
    "names that do not match": ("chr1", 5, 9, "of these records, what the annotation calls it"),
    "names with and without chr": ("chrr1", 5, 9, 'annotation_names: {"r1": "chrr1", "r2": null}'),
    "a negative coordinate": ("r1", -5, 9, "line 1 starts at -5; the first base"),
    "reversed coordinates": ("r1", 9, 5, "line 1 starts at 9 and ends before it, at 5"),
    "of another assembly": ("r1", 5, 999, "the annotation must be of this very assembly"),
}


@pytest.mark.parametrize("kind", ANNOTATIONS)
def test_bad_annotations(folder, monkeypatch, capsys, kind):
    record, first, last, message = ANNOTATIONS[kind]
    Path("bad.fa").write_bytes(GOOD.replace(b"GATTACA", b"CATTACA"))
    Path("bad.gtf").write_text(f"{record}\tme\tgene\t{first}\t{last}\t.\t+\t.\t.\n")
    words = ["gene_distance=5", "without_annotation=keep"]
    words += ["groups.apes.sources.b.annotation=bad.gtf"]
    check_refused(capsys, run(monkeypatch, *words), re.escape(message))


def test_an_output_of_other_settings(folder, monkeypatch, capsys):
    Path("bad.fa").write_bytes(GOOD.replace(b"GATTACA", b"CATTACA"))
    assert run(monkeypatch) == 0
    before = Path("out/manifest.json").read_bytes()
    capsys.readouterr()
    assert run(monkeypatch, "seq_length=8") == 2
    assert "--overwrite" in capsys.readouterr().err
    assert Path("out/manifest.json").read_bytes() == before
    assert run(monkeypatch, "seq_length=8", "--overwrite") == 0
    assert b'"seq_length": 8' in Path("out/manifest.json").read_bytes()


def test_a_data_set_of_an_older_version(folder, monkeypatch, capsys):
    Path("bad.fa").write_bytes(GOOD.replace(b"GATTACA", b"CATTACA"))
    assert run(monkeypatch) == 0
    manifest = Path("out/manifest.json")
    manifest.write_text(manifest.read_text().replace('"format": 2', '"format": 1'))
    capsys.readouterr()
    assert run(monkeypatch) == 2
    shown = capsys.readouterr().err
    assert "has format 1; this version reads format 2: build the data set again" in shown
    assert run(monkeypatch, "--overwrite") == 0


def test_a_weight_that_is_no_number_of_parts_is_told_in_one_line(folder, monkeypatch, capsys):
    (folder / "bad.fa").write_bytes(GOOD + b"A")
    assert run(monkeypatch, "groups.human.weight=0.5") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "groups.human.weight is 0.5" in line and "size" in line and "constrained" not in line
