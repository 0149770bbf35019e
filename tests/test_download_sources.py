"""From accessions and tables to files, against a server that looks like NCBI's."""

from pathlib import Path

import pytest

from data_prep.download.fetch import web_address
from data_prep.download.schema import DownloadConfig
from gengram_megatron.config.load import load_config
from tests.download_checks import check_refused, left, md5

pytest_plugins = ["tests.download_fixtures"]

GENOME = b">chr1\nACGT\n" * 500
GENES = b"##gff-version 3\n" * 40


@pytest.fixture
def ncbi(server):
    """NCBI's tree with one annotated assembly in two versions, and one without a genome."""

    def assembly(parent: str, folder: str, files: dict[str, bytes]) -> None:
        lines = "".join(f"{md5(body)}  ./{folder}_{name}\n" for name, body in files.items())
        server.add(f"{parent}/{folder}/md5checksums.txt", lines.encode())
        for name, body in files.items():
            server.add(f"{parent}/{folder}/{folder}_{name}", body)

    parent = "all/GCA/000/001/405"
    names = ["GCA_000001405.1_First", "GCA_000001405.15_GRCh.38_x"]
    links = "".join(f'<a href="{name}/">{name}/</a> 2024-01-01\n' for name in names)
    server.add(f"{parent}/", f'<a href="/genomes/all/GCA/000/001/">Parent</a>{links}'.encode())
    assembly(parent, names[0], {"genomic.fna.gz": GENOME[:100]})
    files = {"cds_from_genomic.fna.gz": b"cds", "rna_from_genomic.fna.gz": b"rna"}
    files |= {"genomic.fna.gz": GENOME, "genomic.gff.gz": GENES, "genomic.gtf.gz": GENES[:99]}
    assembly(parent, names[1], files)
    server.add("all/GCF/000/000/001/", b'<a href="GCF_000000001.2_Gone/">x</a>')
    assembly("all/GCF/000/000/001", "GCF_000000001.2_Gone", {"assembly_report.txt": b"gone"})
    server.base = f"{server.url}/all"
    return server


def test_genome_and_annotation_of_an_accession(ncbi, download):
    settings = {"assemblies": ["GCA_000001405.15", "GCA_000001405.1"], "base": ncbi.base}
    assert download(ncbi=settings)[0] == 0
    stem = "GCA_000001405.15_GRCh.38_x_genomic"
    assert Path(f"out/{stem}.fna.gz").read_bytes() == GENOME
    assert Path(f"out/{stem}.gff.gz").read_bytes() == GENES
    first = "GCA_000001405.1_First_genomic.fna.gz"
    assert left() == [f"{stem}.fna.gz", f"{stem}.gff.gz", first, "downloads.json"]


@pytest.mark.parametrize(("annotation", "ends"), [("gtf", ["fna", "gtf"]), ("none", ["fna"])])
def test_which_annotation_is_taken(ncbi, download, annotation, ends):
    settings = {"assemblies": ["GCA_000001405.15"], "base": ncbi.base, "annotation": annotation}
    assert download(ncbi=settings)[0] == 0
    stem = "GCA_000001405.15_GRCh.38_x_genomic"
    assert left() == [*(f"{stem}.{end}.gz" for end in ends), "downloads.json"]


@pytest.mark.parametrize(
    ("accession", "message"),
    [
        (
            "GCA_000001405.2",
            "GCA_000001405.2 is not in .* GCA_000001405.1 and GCA_00000140",
        ),
        ("GCA_999999999.1", "999/999/999/ does not exist"),
        ("GCF_000000001.2", "GCF_000000001.2 has no genome at .*use another version"),
        (
            "GCA_000001405",
            r"ncbi.assemblies entry 1 is the text 'GCA_000001405'; it must be .*pattern",
        ),
    ],
)
def test_accessions_that_cannot_be_had(ncbi, download, accession, message):
    result = download(ncbi={"assemblies": [accession], "base": ncbi.base})
    check_refused(result, message)


@pytest.fixture
def table(server, download):
    """A table of two assemblies, as HPRC's: checksums are in files of their own."""
    rows = ["sample_id,assembly_md5,assembly"]
    for name, body in {"HG1": GENOME, "HG2": GENES}.items():
        server.add(f"{name}.fa.gz", body)
        server.add(f"{name}.fa.gz.md5", f"{md5(body)}  {name}.fa.gz\n".encode())
        rows.append(f"{name},{server.url}/{name}.fa.gz.md5,{server.url}/{name}.fa.gz")
    text = "\n".join(rows) + "\n"
    Path("hprc.csv").write_text(text)
    server.add("hprc.tsv", text.replace(",", "\t").encode())
    return {"table": "hprc.csv", "md5": "assembly_md5"}


def test_all_rows_of_a_table(server, download, table):
    assert download(indexes={"hprc": table})[0] == 0
    assert left() == ["HG1.fa.gz", "HG2.fa.gz", "downloads.json"]
    assert Path("out/HG2.fa.gz").read_bytes() == GENES


def test_some_rows_of_a_table_that_is_itself_on_a_server(server, download, table):
    table |= {"table": f"{server.url}/hprc.tsv", "rows": {"sample_id": ["HG2"]}}
    assert download(indexes={"hprc": table})[0] == 0
    assert left() == ["HG2.fa.gz", "downloads.json"]


def test_a_table_that_breaks_off_is_asked_for_again(server, download, table):
    table |= {"table": f"{server.url}/hprc.tsv"}
    server.pages["/hprc.tsv"].cut_after, server.pages["/hprc.tsv"].cuts = 60, 2
    assert download(indexes={"hprc": table})[0] == 0
    assert left() == ["HG1.fa.gz", "HG2.fa.gz", "downloads.json"]


def test_a_checksum_of_a_table_is_checked(server, download, table):
    server.add("HG1.fa.gz", GENES)
    check_refused(download(indexes={"hprc": table}), "HG1.fa.gz has md5 .* and not")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"table": "no.csv"}, "indexes.hprc.table: no.csv cannot be read: No such file"),
        ({"url": "path"}, "hprc.csv has no column 'path'; its columns are sample_id, assembly_md5"),
        (
            {"rows": {"sample_id": ["HG1", "HG3"]}},
            "hprc.rows: no selected row has 'HG3' as its sample_id",
        ),
        ({"url": "sample_id"}, "indexes.hprc, line 2: sample_id is 'HG1', which is not the URL"),
        ({"md5": "sample_id"}, "line 2: HG1 is not an MD5 .*; set md5: null"),
    ],
)
def test_tables_that_cannot_be_used(server, download, table, change, message):
    rows = {"rows": {"sample_id": ["HG1"]}}
    check_refused(download(indexes={"hprc": table | rows | change}), message)


def test_addresses_in_s3_are_read_over_https():
    there = "https://human-pangenomics.s3.amazonaws.com/a/b.fa.gz"
    assert web_address("s3://human-pangenomics/a/b.fa.gz") == there
    assert web_address("https://example.org/x") == "https://example.org/x"


def test_a_list_of_nothing_is_refused(download):
    check_refused(download(), "there is nothing to download; give ncbi, indexes or files")


def test_help_shows_a_list(download):
    code, said, _ = download("--help")
    assert code == 0 and "A download list in full" in said and "GCA_047047975.1" in said


@pytest.mark.parametrize(("number", "accessions"), [(1, 9), (2, 36), (3, 16)])
def test_lists_of_the_papers_sets(number, accessions):
    path = Path(__file__).parent.parent / f"configs/data/download/set{number}.yaml"
    config = load_config(path, [], DownloadConfig)
    assert len(set(config.ncbi.assemblies)) == accessions
    assert all(index.table and index.rows["sample_id"] for index in config.indexes.values())
    assert ("hprc_genes" in config.indexes) == (config.ncbi.annotation != "none") == (number < 3)
