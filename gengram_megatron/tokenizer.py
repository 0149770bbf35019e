"""One token a base: the ten pieces of the published tokenizer, and the end of a document."""

from itertools import zip_longest
from pathlib import Path

import numpy as np

from gengram_megatron.errors import UserError

PIECES = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "C", "G", "T", "A", "N")
"""The published SentencePiece model: a piece's id is its place."""

BASES = "ACGTN"
"""The alphabet in the order of `gengram.token_ids`: a base's place is its digit in a k-mer."""

BASE_IDS = tuple(PIECES.index(base) for base in BASES)

EOD = 12
"""Ends a document. The published model has no such piece; 12 is the id that Megatron's wrapper
gives it, after the ten pieces and a <CLS> 10 and <SEP> 11 of its own."""

IUPAC_AMBIGUOUS = "RYSWKMBDHVU"
"""Letters read as N. U belongs here: it is RNA's letter, and to read it as T would call a base
of DNA what the file does not."""

_NO_NUCLEOTIDE = 255


def _id_of_byte() -> bytes:
    table = bytearray([_NO_NUCLEOTIDE] * 256)
    for letter in BASES + IUPAC_AMBIGUOUS:
        piece = letter if letter in BASES else "N"
        for case in (letter, letter.lower()):
            table[ord(case)] = PIECES.index(piece)
    return bytes(table)


_ID_OF_BYTE = _id_of_byte()
NAMES = (*PIECES, "<CLS>", "<SEP>", "[EOD]")
"""Of all ids in use."""
_NAMES = np.array(NAMES, dtype=object)


class DnaTokenizer:
    """Letters to token ids and back. It has no state: the ids never change."""

    def encode(self, text: bytes | str, skip: bytes = b"", first: int = 1) -> np.ndarray:
        """The id of every letter, as uint8 (not to write to, if `text` is bytes). Case is folded;
        IUPAC's other letters become N.

        Letters of `skip`, such as ends of lines, are left out. Raises UserError at a letter that
        is no nucleotide code; the first one that is not left out is called position `first`.
        """
        raw = bytearray(text.encode("latin-1", "replace")) if isinstance(text, str) else text
        # Several times as fast as numpy's indexing, and the ends of lines go in the same pass.
        ids = np.frombuffer(raw.translate(_ID_OF_BYTE, skip), dtype=np.uint8)
        if ids.size and ids.max() == _NO_NUCLEOTIDE:
            place = int(np.argmax(ids))
            if isinstance(text, bytes):
                text = text.translate(None, skip).decode("latin-1")
            raise UserError(
                f"{text[place]!r} at position {first + place:,} is no nucleotide code "
                f"(one of {BASES} or, read as N, {IUPAC_AMBIGUOUS})"
            )
        return ids

    def decode(self, ids: np.ndarray) -> str:
        """The letters of token ids; other tokens by their names, such as [PAD] and [EOD]."""
        ids = np.asarray(ids)
        if ids.size and not 0 <= ids.min() <= ids.max() < len(_NAMES):
            raise UserError(f"token ids must lie between 0 and {EOD}, not {ids.min()}..{ids.max()}")
        return "".join(_NAMES[ids])

    @staticmethod
    def check_sentencepiece(path: Path) -> None:
        """Raise UserError unless the SentencePiece model at `path` has exactly our ids."""
        import sentencepiece  # here, so that preparing data does not wait for it

        if not Path(path).is_file():
            raise UserError(f"{path}: there is no such SentencePiece model")
        try:
            model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError):
            raise UserError(f"{path} is not a SentencePiece model") from None
        pieces = [model.id_to_piece(number) for number in range(len(model))]
        for number, (found, expected) in enumerate(zip_longest(pieces, PIECES)):
            if expected is None:
                raise UserError(
                    f"{path}: piece {found} has id {number}, "
                    f"but only ids 0 to {len(PIECES) - 1} are expected"
                )
            if found != expected:
                place = f"has id {pieces.index(expected)}" if expected in pieces else "is missing"
                raise UserError(f"{path}: piece {expected} {place}; its id must be {number}")
