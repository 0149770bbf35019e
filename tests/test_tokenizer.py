"""The ids of letters, and the published SentencePiece model held against them."""

import io
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2

from gengram_megatron.errors import UserError
from gengram_megatron.tokenizer import BASE_IDS, EOD, PIECES, DnaTokenizer

PUBLISHED = ["[CLS]", "[SEP]", "[MASK]", "C", "G", "T", "A", "N"]


def slow_id(letter: str) -> int:
    return {"C": 5, "G": 6, "T": 7, "A": 8}.get(letter.upper(), 9)


def sentencepiece_model(path: Path, pieces: list[str]) -> Path:
    """A real SentencePiece model with [PAD] 0, [UNK] 1 and then the pieces."""
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["x"]),
        model_writer=trained,
        model_type="char",
        vocab_size=len(pieces) + 3,
        pad_id=0,
        unk_id=1,
        bos_id=-1,
        eos_id=-1,
        pad_piece="[PAD]",
        unk_piece="[UNK]",
        user_defined_symbols=pieces,
        hard_vocab_limit=False,
        minloglevel=3,
    )
    # The trainer insists on a piece of its own for the text it saw; the published model has none.
    model = sentencepiece_model_pb2.ModelProto.FromString(trained.getvalue())
    del model.pieces[len(pieces) + 2 :]
    path.write_bytes(model.SerializeToString())
    return path


def test_the_published_ids():
    assert BASE_IDS == (8, 5, 6, 7, 9)
    assert (len(PIECES), EOD) == (10, 12)
    assert DnaTokenizer().encode("ACGTN").tolist() == [8, 5, 6, 7, 9]


@settings(deadline=None)  # the machine may be busy
@given(st.text("ACGTNRYSWKMBDHVUacgtnryswkmbdhvu"))
def test_encode_against_a_loop(text):
    ids = DnaTokenizer().encode(text)
    assert ids.dtype == np.uint8
    assert ids.tolist() == [slow_id(letter) for letter in text]
    assert DnaTokenizer().encode(text.encode()).tolist() == ids.tolist()


@settings(deadline=None)  # the machine may be busy
@given(st.text("ACGTN"))
def test_decode_undoes_encode(text):
    assert DnaTokenizer().decode(DnaTokenizer().encode(text)) == text


def test_decode_names_other_tokens():
    assert DnaTokenizer().decode(np.array([8, 5, EOD, 0])) == "AC[EOD][PAD]"
    with pytest.raises(UserError, match=r"between 0 and 12, not 8\.\.13"):
        DnaTokenizer().decode(np.array([8, 13]))


@pytest.mark.parametrize("text", ["ACGEA", "ACG-A", "ACG A", "ACGéA", "ACG€A", b"ACG\xffA"])
def test_other_letters_are_refused_with_their_place(text):
    with pytest.raises(UserError, match="at position 4 is not a nucleotide code"):
        DnaTokenizer().encode(text)


def test_what_is_skipped_does_not_count():
    assert DnaTokenizer().encode(b"AC\nG\r\nT\n", skip=b"\r\n").tolist() == [8, 5, 6, 7]
    with pytest.raises(UserError, match="'E' at position 1,003 is not a nucleotide code"):
        DnaTokenizer().encode(b"A\nC\nEF", skip=b"\n", first=1001)


def test_the_published_sentencepiece_model_is_accepted(tmp_path):
    DnaTokenizer.check_sentencepiece(sentencepiece_model(tmp_path / "dna.model", PUBLISHED))


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ([*PUBLISHED[:3], "A", "C", "G", "T", "N"], "piece C has id 6; its id must be 5"),
        (PUBLISHED[:-1], "piece N is missing; its id must be 9"),
        ([*PUBLISHED, "R"], "piece R has id 10, but only ids 0 to 9 are expected"),
    ],
)
def test_another_sentencepiece_model_is_refused(tmp_path, pieces, message):
    model = sentencepiece_model(tmp_path / "dna.model", pieces)
    with pytest.raises(UserError, match=message):
        DnaTokenizer.check_sentencepiece(model)


def test_what_is_no_sentencepiece_model_is_refused(tmp_path):
    with pytest.raises(UserError, match="no such SentencePiece model"):
        DnaTokenizer.check_sentencepiece(tmp_path / "none.model")
    (tmp_path / "text.model").write_text("hello")
    with pytest.raises(UserError, match="is not a SentencePiece model"):
        DnaTokenizer.check_sentencepiece(tmp_path / "text.model")
