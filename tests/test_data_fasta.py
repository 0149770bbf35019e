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

from data_prep.fasta import read_fasta
from gengram_megatron.errors import UserError

TEXT = b">one first\nACGTN\nACG\n\n>two\nTTT\n"
EXPECTED = [("one", [8, 5, 6, 7, 9, 8, 5, 6]), ("two", [7, 7, 7])]

sequences = st.text("ACGTacgtNnRYSWKMBDHVU", min_size=1, max_size=60)


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
@given(st.lists(sequences, min_size=1, max_size=5), st.integers(1, 20), st.booleans())
def test_against_a_slow_reading_of_the_same_text(records, width, packed):
    records = ["A", *records]  # a file of nothing but N is refused
    lines = []
    for number, sequence in enumerate(records):
        lines += [f">r{number} some words"]
        lines += [sequence[start : start + width] for start in range(0, len(sequence), width)]
    data = "\n".join(lines).encode()
    slow = [
        (f"r{number}", ["CGTA".find(letter) % 5 + 5 for letter in sequence.upper()])
        for number, sequence in enumerate(records)
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.fa"
        path.write_bytes(gzip.compress(data) if packed else data)
        assert read(path) == slow


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
