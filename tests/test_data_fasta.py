"""Reading FASTA: what is the same data must come out the same, whatever the file looks like."""

import bz2
import gzip
import lzma
import struct
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import xopen
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import fasta
from data_prep.compressed import HashingReader, bytes_after
from data_prep.fasta import read_counts, read_fasta, read_token_ranges
from data_prep.manifest import file_facts
from gengram_megatron.errors import UserError
from gengram_megatron.tokenizer import BASE_IDS

TEXT = b">one first\nACGTN\nACG\n\n>two\nTTT\n"
EXPECTED = [("one", [8, 5, 6, 7, 9, 8, 5, 6]), ("two", [7, 7, 7])]
BASES = [ids for _, ids in EXPECTED]

sequences = st.text("ACGTacgtNnRYSWKMBDHV", min_size=1, max_size=60)


def read(path: Path) -> list[tuple[str, list[int]]]:
    return [(name, ids.tolist()) for name, ids in read_fasta(path)]


def bgzip(data: bytes, block: int = 7) -> bytes:
    """Blocked gzip: members with their own size in an extra field, and an empty one at the end."""
    members = []
    for start in [*range(0, len(data), block), len(data)]:
        part = data[start : start + block]
        packer = zlib.compressobj(9, zlib.DEFLATED, -15)
        body = packer.compress(part) + packer.flush()
        header = b"\x1f\x8b\x08\x04" + bytes(4) + b"\x00\xff\x06\x00BC\x02\x00"
        size = len(header) + 2 + len(body) + 8 - 1
        tail = struct.pack("<II", zlib.crc32(part), len(part))
        members.append(header + struct.pack("<H", size) + body + tail)
    return b"".join(members)


def zstd(data: bytes) -> bytes:
    """Two frames, as tools that pack in parallel write them."""
    half = len(data) // 2
    return b"".join(xopen.zstd.compress(part) for part in (data[:half], data[half:]))


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("plain.fa", TEXT),
        ("gzip.fa.gz", gzip.compress(TEXT)),
        ("bgzip.fa.gz", bgzip(TEXT)),
        ("no_suffix", gzip.compress(TEXT)),
        ("bzip2.fa.bz2", bz2.compress(TEXT[:9]) + bz2.compress(TEXT[9:])),
        ("bzip2", bz2.compress(TEXT)),
        ("xz.fa.xz", lzma.compress(TEXT[:9]) + lzma.compress(TEXT[9:])),
        ("xz", lzma.compress(TEXT)),
        ("zstd.fa.zst", zstd(TEXT)),
        ("zstd", zstd(TEXT)),
        ("windows.fa", TEXT.replace(b"\n", b"\r\n")),
        ("lower.fa", TEXT.replace(b"ACG", b"acg")),
        ("no_newline_at_end.fa", TEXT.rstrip()),
        ("iupac.fa", TEXT.replace(b"N", b"R")),
    ],
)
def test_every_form_of_the_same_data_reads_the_same(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    assert read(tmp_path / name) == EXPECTED


@settings(deadline=None)  # the machine may be busy
@given(
    records=st.lists(sequences, min_size=1, max_size=5),
    width=st.integers(1, 20),
    end=st.sampled_from(["\n", "\r\n", " \n\n"]),
    packed=st.booleans(),
    block=st.integers(1, 40),
    multiple=st.integers(1, 30),
)
def test_against_a_slow_reading_of_the_same_text(records, width, end, packed, block, multiple):
    lines = []
    for number, sequence in enumerate(records):
        lines += [f">r{number} some > words"]
        lines += [sequence[start : start + width] for start in range(0, len(sequence), width)]
    data = end.join(lines).encode()
    slow = [
        (f"r{number}", ["CGTA".find(letter) % 5 + 5 for letter in sequence.upper()])
        for number, sequence in enumerate(records)
    ]
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(fasta, "BLOCK", block)  # so that blocks end at any place
        path = Path(folder) / "x.fa"
        path.write_bytes(gzip.compress(data) if packed else data)
        assert read(path) == slow
        pieces = list(read_token_ranges(path, multiple))
        counted = list(read_counts(path))
    for name, bases in slow:
        blocks = [block for block in counted if block.name == name]
        composition = sum(block.composition for block in blocks)
        assert composition.tolist() == [bases.count(base) for base in BASE_IDS]
        for block in blocks:
            assert block.header == f"{name} some > words"
            ids = [] if block.ids is None else block.ids.tolist()
            assert block.composition[-1] == ids.count(fasta.N)
        own = [piece for piece in pieces if piece.name == name]
        assert [base for piece in own for base in piece.ids.tolist()] == bases
        ends = [piece.start + len(piece.ids) for piece in own]
        assert [piece.start for piece in own] == [0, *ends[:-1]]
        assert all(end % multiple == 0 for end in ends[:-1]) and ends[-1] == len(bases)
        assert {piece.header for piece in own} == {f"{name} some > words"}


def error_of(read, path: Path) -> str | None:
    """What is said of a file; None if it can be read."""
    try:
        for _ in read(path):
            pass
    except UserError as error:
        return str(error)


@settings(deadline=None)  # the machine may be busy
@given(
    lines=st.lists(st.text("ACGTacgtN", min_size=6, max_size=6), min_size=1, max_size=9),
    other=st.sampled_from(["", "\n", "\r", " ", "X", "U", "u", "-", "*", "\x01", "é", ">"]),
    place=st.integers(0, 60),
    block=st.integers(1, 40),
)
def test_counting_finds_the_errors_of_reading(lines, other, place, block):
    text = "\n".join(lines)
    data = f">r\n{text[:place]}{other}{text[place:]}".encode()
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(fasta, "BLOCK", block)
        path = Path(folder) / "x.fa"
        path.write_bytes(data)
        error = error_of(lambda path: read_token_ranges(path, 1), path)
        assert error_of(read_counts, path) == error
    if other in ("X", "U", "u", "-", "*", "\x01", "é"):
        assert error is not None


def test_the_checksum_of_what_was_read(tmp_path):
    path = tmp_path / "x.fa.gz"
    path.write_bytes(gzip.compress(TEXT) + bytes(1000))  # padding, as of tapes
    with HashingReader(path) as file:
        assert [piece.name for piece in read_token_ranges(path, 1, file)] == ["one", "two"]
    assert file.facts() == file_facts(path)


def test_a_header_without_end_is_no_fasta(tmp_path):
    (tmp_path / "x.fa").write_bytes(b">" + b"x" * 5_000_000)
    with pytest.raises(UserError, match="is not a FASTA file: a header has more than"):
        read(tmp_path / "x.fa")


DNA = b">a\n" + np.random.default_rng(0).choice([*b"ACGT"], 50_000).tobytes()
PACKED = gzip.compress(DNA)
PACKERS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstd}


@pytest.mark.parametrize("kind", PACKERS)
@pytest.mark.parametrize("cut", [0.1, 0.5, 0.99])
def test_a_truncated_file_never_passes(tmp_path, kind, cut):
    packed = PACKERS[kind](DNA)
    path = tmp_path / f"x.fa.{kind}"
    path.write_bytes(packed[: int(len(packed) * cut)])
    with pytest.raises(UserError, match="truncated or damaged"):
        read(path)


@pytest.mark.parametrize("kind", ["gz", "bgz", "bz2", "xz"])
@pytest.mark.parametrize(
    ("after", "count"),
    [
        (b"\1\2xyz", 5),
        (bytes(20) + b"abc\x1f\x8b\xffBZhx" + bytes(70_000), 70_010),
        (bytes(70_000), 0),
    ],
)
def test_bytes_after_the_compressed_data_are_no_part_of_it(tmp_path, kind, after, count):
    path = tmp_path / f"x.fa.{kind}"
    path.write_bytes(PACKERS.get(kind, bgzip)(TEXT) + after)
    with HashingReader(path) as file:
        assert [piece.ids.tolist() for piece in read_token_ranges(path, 1, file)] == BASES
    assert bytes_after(path) == count
    assert file.facts() == file_facts(path)
    assert read(path) == EXPECTED


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz"])
@pytest.mark.parametrize("damage", ["start of the second", "end of the first", "cut", "cut short"])
def test_a_damaged_stream_is_not_taken_for_bytes_after_the_data(tmp_path, kind, damage):
    part = PACKERS[kind](DNA)
    data = bytearray(part * 3)
    if damage == "start of the second":
        data[len(part)] ^= 0x55
    elif damage == "end of the first":
        data[len(part) - 6] ^= 0x55
    else:
        del data[2 * len(part) + (1 if damage == "cut short" else 9) :]
    path = tmp_path / f"x.fa.{kind}"
    path.write_bytes(data)
    with pytest.raises(UserError, match="truncated or damaged"):
        read(path)


def test_a_python_without_zstd_is_a_sentence(tmp_path, monkeypatch):
    (tmp_path / "x.fa.zst").write_bytes(zstd(TEXT))
    monkeypatch.setattr(xopen, "zstd", None)
    with pytest.raises(UserError, match=r"x\.fa\.zst is compressed with zstd.* pip install"):
        read(tmp_path / "x.fa.zst")


@pytest.mark.parametrize("place", [15, 100, 5_000, len(PACKED) - 6, len(PACKED) - 2])
def test_a_damaged_gzip_never_passes(tmp_path, place):
    damaged = bytearray(PACKED)
    damaged[place] ^= 0x55
    (tmp_path / "x.fa.gz").write_bytes(damaged)
    with pytest.raises(UserError, match="truncated or damaged"):
        read(tmp_path / "x.fa.gz")
