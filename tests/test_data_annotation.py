"""Genes and how far fragments lie from them, against loops over single bases."""

import bz2
import gzip
import json
import re
import tempfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import cli
from data_prep.annotation import Annotation, read_annotation
from data_prep.build import build
from data_prep.fragment import Fate, Record
from data_prep.genes import drop_far, near
from data_prep.inspect.opened import read_facts
from data_prep.schema import DataConfig, Source
from gengram_megatron.errors import UserError
from tests.origins import Origins

ROOT = Path(__file__).parent.parent
GTF = b"""#!genome-build made up
r1\tme\tgene\t11\t20\t.\t+\t.\tgene_id "a";
r1\tme\ttranscript\t12\t18\t.\t+\t.\tgene_id "a"; transcript_id "a.1";
r2\tme\tgene\t1\t5\t.\t-\t.\tgene_id "b";
"""
GFF = b"##gff-version 3\n" + GTF.replace(b"\tgene\t1\t", b"\tpseudogene\t1\t")
BED = b"track name=genes\nr1 10 20 a\nr2\t0\t5\tb\n"
EXPECTED = {"r1": [[10, 20]], "r2": [[0, 5]]}


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.gtf", GTF),
        ("a.gtf.gz", gzip.compress(GTF)),
        ("a.v1.gff3.bz2", bz2.compress(GFF + b"##FASTA\n>r1\nACGT\n")),
        ("a.gff", GFF.replace(b"\n", b"\r\n")),
        ("a.BED", BED),
        ("a.bed", b"\n# made up\n" + BED),
        ("a.gff3", b"\xef\xbb\xbf" + GTF.partition(b"\n")[2]),
    ],
)
def test_every_form_of_the_same_genes_reads_the_same(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    found = read_annotation(tmp_path / name)
    assert {record: genes.tolist() for record, genes in found.genes.items()} == EXPECTED
    assert found.kind == ("region" if "bed" in name.lower() else "gene")


def features(*rows: tuple[str, str, int, int] | tuple[str, str, int, int, str]) -> bytes:
    """Lines of GFF3 from record, type, first and last base, and attributes."""
    lines = [
        f"{record}\tme\t{kind}\t{first}\t{last}\t.\t+\t.\t{';'.join(['ID=x', *more])}\n"
        for record, kind, first, last, *more in rows
    ]
    return "".join(lines).encode()


def read(folder: Path, data: bytes, name: str = "a.gff3") -> Annotation:
    (folder / name).write_bytes(data)
    return read_annotation(folder / name)


@pytest.mark.parametrize(
    ("kind", "level"),
    [
        ("gene", "gene"),
        ("protein_coding_gene", "gene"),  # VEuPathDB
        ("transposable_element_gene", "gene"),  # TAIR
        ("Pseudogene", "gene"),
        ("SO:0001217", "gene"),
        ("mRNA", "transcript"),
        ("lnc_RNA", "transcript"),
        ("pseudogenic_transcript", "transcript"),
        ("V_gene_segment", "transcript"),
        ("pseudogenic_exon", "exon"),
        ("CDS", "CDS"),
        ("region", None),
        ("gene_island", None),
    ],
)
def test_what_counts_as_a_gene(tmp_path, kind, level):
    found = read(tmp_path, features(("r1", kind, 11, 20), ("r2", "gene", 1, 5)))
    assert (found.genes.keys() == {"r1", "r2"}) == (level is not None)
    assert found.outside == ({level: 1} if level not in (None, "gene") else {})
    assert found.ignored == ({} if level else {kind: 1})


def test_a_feature_inside_one_of_a_higher_level_adds_nothing(tmp_path):
    rows = [
        ("r", "gene", 11, 50),
        ("r", "gene", 21, 30),
        ("r", "exon", 41, 50),
        ("r", "mRNA", 11, 50),
        ("r", "mRNA", 61, 90),
        ("r", "exon", 61, 70),
        ("r", "CDS", 12, 13),
        ("r", "CDS", 89, 91),
        ("r", "five_prime_UTR", 1, 9),
    ]
    found = read(tmp_path, features(*rows))
    assert found.genes["r"].tolist() == [[10, 50], [20, 30], [60, 90], [88, 91]]
    assert (found.kind, found.outside) == ("gene", {"transcript": 1, "CDS": 1})
    assert found.ignored == {"five_prime_UTR": 1}


kinds = st.sampled_from(["gene", "mRNA", "exon", "CDS"])
rows = st.tuples(st.sampled_from("rs"), kinds, st.integers(1, 60), st.integers(0, 25))


@settings(deadline=None)  # the machine may be busy
@given(st.lists(rows, min_size=1, max_size=12))
def test_no_base_of_any_feature_is_lost(lines):
    lines = [(record, kind, first, first + more) for record, kind, first, more in lines]
    with tempfile.TemporaryDirectory() as folder:
        found = read(Path(folder), features(*lines))
    genes = {(record, *span) for record, own in found.genes.items() for span in own.tolist()}
    covered = {(record, base) for record, start, end in genes for base in range(start, end)}
    said = {(record, base) for record, _, a, b in lines for base in range(a - 1, b)}
    assert covered == said
    assert genes >= {(record, a - 1, b) for record, kind, a, b in lines if kind == "gene"}


@pytest.mark.parametrize("attribute", ['gene_id "g"; transcript_id "t"', "Parent=t"])
def test_exons_without_a_transcript_are_joined_with_their_introns(tmp_path, attribute):
    other = attribute.replace('"t"', '"u"').replace("=t", "=u")
    data = features(
        ("r", "exon", 41, 50, attribute),
        ("r", "exon", 11, 20, attribute),
        ("s", "exon", 1, 5, attribute),
        ("r", "exon", 71, 80, other),
        ("r", "CDS", 21, 30, attribute),
    )
    found = read(tmp_path, data, "a.gtf")
    genes = {record: own.tolist() for record, own in found.genes.items()}
    assert genes == {"r": [[10, 50], [70, 80]], "s": [[0, 5]]}
    assert (found.kind, found.outside) == ("exon", {})


SEQUENCE = b">r1 a header\twith tabs\nACGT\n"


@pytest.mark.parametrize(
    "between",
    [
        b"##FASTATKAANICDYENLA\n",  # a protein, as MetaGeneMark writes it
        b"##FASTA\n" + SEQUENCE + b"##gff-version 3\n",  # two files put together
        b"# a comment\n\n",
    ],
)
@pytest.mark.parametrize("last", [b"", SEQUENCE, b"##FASTA\r\n" + SEQUENCE, b"##FASTA \n>r1\nA"])
def test_features_end_where_the_sequences_begin(tmp_path, between, last):
    data = features(("r1", "gene", 1, 5)) + between + features(("r2", "gene", 1, 5)) + last
    assert read(tmp_path, data).genes.keys() == {"r1", "r2"}


def gtf(*rows: tuple[str, int, int]) -> bytes:
    return "".join(f"{name}\tme\tgene\t{a}\t{b}\t.\t+\t.\t.\n" for name, a, b in rows).encode()


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.gtf", gtf(("r1", -5, 4)), "line 1 starts at -5; the first base"),
        ("a.gtf", gtf(("r1", 1, 2), ("r1", 0, 4)), "line 2 starts at 0; the first base .* is 1"),
        ("a.gtf", gtf(("r1", 9, 8)), "line 1 starts at 9 and ends before it, at 8"),
        ("a.bed", b"r1 -1 4\n", "line 1 starts at -1"),
        ("a.bed", b"r1 9 8\n", "line 1 starts at 9 and ends before it"),
        ("a.bed", b"r1 nine 10\n", "line 1 has 'nine' where a coordinate should be"),
        ("a.bed", b"r1 9\n", "line 1 has 2 fields; BED has 3"),
        ("a.gtf", b"r1 gene 1 2\n", "line 1 has 1 fields between tabs"),
        ("a.gtf", b"# nothing\n", "has no genes.* it has no features"),
        ("a.gtf", b"r1\tme\tmatch\t1\t2\t.\t+\t.\t.\n", r"has no genes.* match \(1\)"),
        ("a.txt", GTF, "must end in .gtf, .gff3, .gff or .bed"),
        ("a.gtf", b"r1\tme\xff\tgene\t1\t2\t.\t+\t.\t.\n", "is not an annotation: it is not text"),
        ("a.gtf.gz", gzip.compress(GTF)[:-12], "truncated or damaged"),
    ],
)
def test_wrong_files_are_refused(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message):
        read_annotation(tmp_path / name)


spans = st.tuples(st.integers(0, 90), st.integers(1, 25)).map(lambda it: [it[0], sum(it)])


def slow_near(start: int, end: int, genes: list[list[int]], distance: int) -> bool:
    """Walk from the fragment, base by base, and see whether a gene is met in time."""
    covered = {base for first, last in genes for base in range(first, last)}
    return any(base in covered for base in range(start - distance - 1, end + distance + 1))


@settings(deadline=None)  # the machine may be busy
@given(st.lists(spans, max_size=5), st.integers(1, 12), st.integers(0, 40))
def test_distance_against_a_walk_over_bases(genes, seq_length, distance):
    starts = np.arange(120 // seq_length) * seq_length
    found = near(starts, starts + seq_length, np.array(genes, dtype=int).reshape(-1, 2), distance)
    for start, is_near in zip(starts.tolist(), found):
        assert is_near == slow_near(start, start + seq_length, genes, distance)


def drop(folder: Path, data: bytes, names: list[str], **settings) -> list[list[int]]:
    """The fates of fragments of 10 in records of 100 bases, with a distance of 10."""
    (folder / "a.gtf").write_bytes(data)
    records = [Record(name, 100, np.zeros(10, dtype=np.uint32)) for name in names]
    fates = [np.full(10, Fate.TRAIN, dtype=np.uint8) for _ in names]
    source = Source(fasta="x.fa", annotation="a.gtf", **settings)
    drop_far(fates, records, source, folder / "a.gtf", 10, 10)
    return [(fate == Fate.TRAIN).astype(int).tolist() for fate in fates]


def test_fragments_far_from_genes_are_dropped(tmp_path):
    one = [0, 0, 0, 1, 1, 1, 1, 1, 0, 0]  # the gene has all of fragment 5 and touches 4 and 6
    assert drop(tmp_path, gtf(("r1", 50, 61)), ["r1", "r2"]) == [one, [0] * 10]
    inside = drop(tmp_path, gtf(("r1", 1, 100)), ["r1"])
    assert inside == [[1] * 10]


def test_genes_over_the_origin_of_a_circle(tmp_path):
    circle = features(("r1", "region", 1, 100, "Is_circular=true"), ("r1", "gene", 91, 104))
    assert drop(tmp_path, circle, ["r1"]) == [[1, 1, 0, 0, 0, 0, 0, 1, 1, 1]]
    at_the_end = circle.replace(b"\t91\t104", b"\t96\t100")
    assert drop(tmp_path, at_the_end, ["r1"]) == [[1, 1, 0, 0, 0, 0, 0, 0, 1, 1]]
    with pytest.raises(
        UserError, match=r"91 to 104, but record r1 .* only 100; .* Is_circular=true"
    ):
        drop(tmp_path, circle.replace(b"Is_circular=true", b"Is_circular=false"), ["r1"])
    for beyond in (b"\t91\t201", b"\t101\t104"):
        with pytest.raises(UserError, match=r"record r1 of .* has only 100"):
            drop(tmp_path, circle.replace(b"\t91\t104", beyond), ["r1"])


@pytest.mark.parametrize(
    ("name", "record"),
    [("gi%7C1", "gi|1"), ("gi%7C1", "gi%7C1"), ("gi|1", "gi%7C1"), ("%3Er%25", ">r%")],
)
def test_escaped_names_are_decoded(tmp_path, name, record):
    data = features((name, "gene", 50, 61))
    assert sum(drop(tmp_path, data, [record, "other"])[0]) == 5
    for alias in (name, record):
        found = drop(tmp_path, data, ["r1", record], annotation_names={"r1": alias})
        assert sum(found[0]) == 5


def test_names_that_differ_are_mapped(tmp_path):
    data = gtf(("20", 50, 61), ("MT", 1, 100))
    with pytest.raises(UserError, match=r"a\.gtf has genes on 20, MT, .* annotation_names: ") as no:
        drop(tmp_path, data, ["chr20", "chrM", "scaffold"])
    mapping = json.loads(str(no.value).split("annotation_names: ")[1])
    assert mapping == {"chr20": "20", "chrM": "MT", "scaffold": None}
    found = drop(tmp_path, data, list(mapping), annotation_names=mapping)
    assert [sum(kept) for kept in found] == [5, 10, 0]


@pytest.mark.parametrize(
    ("records", "names", "mapping"),
    [
        (["GRCh38#0#chr1", "GRCh38#0#chr2"], ["chr1", "2"], ["chr1", "2"]),
        (["NC_1.1", "NC_2.1"], ["gi|8|ref|NC_2.1|", "gi|7|ref|NC_1.1|"], [1, 0]),
        (["a#1#x", "b#1#y", "a#2#z"], ["a#2#x", "y", "z"], [None, "y", "z"]),  # another haplotype
        (["chr1", "chr2", "chrM"], ["NC_1.1", "NC_2.1", "MT"], None),
        (["chr1", "Chr1"], ["1", "Un"], None),  # it may be either
        (["chr1"], ["other"], None),
    ],
)
def test_a_mapping_that_would_drop_most_is_not_proposed(tmp_path, records, names, mapping):
    with pytest.raises(UserError, match="annotation_names") as no:
        drop(tmp_path, gtf(*((name, 1, 9) for name in names)), records)
    proposed = re.search(r"annotation_names: (\{.*\})$", str(no.value))
    if mapping is None:
        assert proposed is None
    else:
        said = [names[it] if isinstance(it, int) else it for it in mapping]
        assert json.loads(proposed[1]) == dict(zip(records, said))


def test_an_annotation_of_more_than_the_file_has_is_welcome(tmp_path):
    assert sum(drop(tmp_path, gtf(("r1", 50, 61), ("r2", 1, 9)), ["r1"])[0]) == 5


@pytest.mark.parametrize(
    ("data", "names", "message"),
    [
        (gtf(("r1", 5, 101)), {}, "has bases 5 to 101, but record r1 of x.fa has only 100"),
        (gtf(("r1", 5, 9)), {"r9": "r1"}, "annotation_names has r9, which is not a record of x.fa"),
        (gtf(("r1", 5, 9)), {"r1": "r9"}, "maps r1 to r9, on which a.gtf has no genes"),
    ],
)
def test_an_annotation_of_another_assembly_is_refused(tmp_path, data, names, message):
    with pytest.raises(UserError, match=message):
        drop(tmp_path, data, ["r1"], annotation_names=names)


def sample(output: Path, **chr20) -> DataConfig:
    fasta = "sample_data/human_GRCh37_chr20_30M-34M.fa.gz"
    groups = {"human": {"sources": {"chr20": {"fasta": fasta, **chr20}}}}
    return DataConfig.model_validate(
        {"output": str(output), "seq_length": 512, "gene_distance": 5120, "groups": groups}
    )


def test_the_genes_of_the_sample(tmp_path):
    name = "sample_data/human_GRCh37_chr20_30M-34M.gtf.gz"
    manifest = build(
        sample(tmp_path / "out", annotation=name), ROOT, False, lambda doing, bases: None
    )
    lines = gzip.decompress((ROOT / name).read_bytes()).decode().splitlines()
    rows = [line.split("\t") for line in lines if line[0] != "#"]
    genes = [(int(row[3]) - 1, int(row[4])) for row in rows if row[2] == "gene"]
    splits = [Origins(tmp_path / "out", split, 512) for split in ("train", "validation")]
    kept = {found[number].start for found in splits for number in range(len(found))}
    for start in range(0, 4_000_000 - 511, 512):
        gap = min(max(first - start - 512, start - last, 0) for first, last in genes)
        assert (start in kept) == (gap <= 5120)
    facts = manifest["sources"]["human/chr20"]
    assert facts["genes"] == {"kind": "gene", "count": len(genes)}  # its exons lie in them
    assert facts["far_from_genes"] > 0 and facts["too_many_n"] == 0
    assert facts["validation"] == round(0.05 * len(kept))  # a share of those near genes


def test_an_annotation_that_changes_is_another_source(tmp_path):
    (tmp_path / "x.bed").write_text("chr20_30M_34M 3700000 3900000\n")
    config = sample(tmp_path / "out", annotation=str(tmp_path / "x.bed"))
    manifest = build(config, ROOT, False, lambda doing, bases: None)
    assert manifest["sources"]["human/chr20"]["genes"] == {"kind": "region", "count": 1}
    assert build(config, ROOT, False, lambda doing, bases: None) is None
    (tmp_path / "x.bed").write_text("chr20_30M_34M 3700000 3900001\n")
    with pytest.raises(UserError, match=r"from other sources \(human/chr20 changed\)"):
        build(config, ROOT, False, lambda doing, bases: None)


def test_what_becomes_of_a_source_without_annotation(tmp_path):
    with pytest.raises(ValueError, match=r"sources\.chr20 has no annotation; .* keep or drop"):
        sample(tmp_path)
    with pytest.raises(UserError, match="7,812 were dropped for their distance from genes"):
        config = sample(tmp_path / "out", without_annotation="drop")
        build(config, ROOT, False, lambda doing, bases: None)
    kept = sample(tmp_path / "out", without_annotation="keep")
    manifest = build(kept, ROOT, False, lambda doing, bases: None)
    assert manifest["groups"]["human"]["far_from_genes"] == 0


def test_a_build_says_what_it_took_for_genes_and_what_it_ignored(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    bases = np.random.default_rng(1).choice([*"ACGT"], (3, 400))
    for name, own in zip("abc", bases):
        Path(f"{name}.fa").write_text(f">r\n{''.join(own)}\n")
    whole = ("r", "gene", 1, 400)
    Path("a.gff3").write_bytes(features(whole, ("r", "mRNA", 1, 9), ("r", "match", 1, 9)))
    outside = ("r", "mRNA", 300, 350)
    Path("b.gff3").write_bytes(features(("r", "gene", 1, 299), outside, ("r", "match", 1, 9)))
    Path("c.gff3").write_bytes(
        features(("r", "CDS", 1, 400), ("r", "repeat", 1, 9), ("s", "CDS", 1, 9))
    )
    Path("data.yaml").write_text(
        "output: out\nseq_length: 16\nvalidation: 0.25\ngene_distance: 5\n"
        'groups: {g: {sources: {"*": {fasta: "*.fa", annotation: "*.gff3"}}}}\n'
    )
    monkeypatch.setattr("sys.argv", ["gengram-data", "build", "data.yaml"])
    with suppress(SystemExit):
        cli.main()
    shown = capsys.readouterr()
    assert "g/c" in next(line for line in shown.err.splitlines() if "CDS features" in line)
    assert "g/b (transcript 1)" in shown.err and "g/a" not in shown.err
    assert "g/c (1)" in next(line for line in shown.err.splitlines() if "does not have" in line)
    assert "match 2, repeat 1" in shown.out
    found = {key: facts.genes for key, facts in read_facts(Path("out")).sources.items()}
    assert found == {
        "g/a": {"kind": "gene", "count": 1, "ignored": {"match": 1}},
        "g/b": {"kind": "gene", "count": 2, "outside": {"transcript": 1}, "ignored": {"match": 1}},
        "g/c": {"kind": "CDS", "count": 1, "elsewhere": 1, "ignored": {"repeat": 1}},
    }
