"""The tokenizer with one token per base: the ten pieces of the published one, and an
end-of-document token."""

from itertools import zip_longest
from pathlib import Path

import numpy as np

from gengram_megatron.errors import UserError

PIECES = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "C", "G", "T", "A", "N")
"""The pieces of the published SentencePiece model; a piece's id is its index."""

BASES = "ACGTN"
"""The alphabet in the order of `gengram.token_ids`; a base's index is its digit in a k-mer."""

BASE_IDS = tuple(PIECES.index(base) for base in BASES)

EOD = 12
"""The id of the end-of-document token. The published model has no such piece; 12 is the id that
Megatron's wrapper gives it, after the ten pieces and its own <CLS> 10 and <SEP> 11."""

IUPAC_AMBIGUOUS = "RYSWKMBDHVU"
"""Letters that are read as N. U is one of them: it is a letter of RNA, and reading it as T would
claim a base of DNA that is not in the file."""

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
"""The names of all ids in use, by id."""
_NAMES = np.array(NAMES, dtype=object)


class DnaTokenizer:
    """Converts letters to token ids and back. It has no state, because the ids never change."""

    def encode(self, text: bytes | str, skip: bytes = b"", first: int = 1) -> np.ndarray:
        """Returns the ids of all letters as uint8, read-only if `text` is bytes. Case is ignored,
        and IUPAC's other letters become N.

        Raises UserError if a letter is not a nucleotide code.

        Args:
            skip: letters to leave out, such as line ends.
            first: position of the first letter that is not left out, for the error message.
        """
        raw = bytearray(text.encode("latin-1", "replace")) if isinstance(text, str) else text
        # Several times as fast as numpy's indexing, and it removes line ends in the same pass.
        ids = np.frombuffer(raw.translate(_ID_OF_BYTE, skip), dtype=np.uint8)
        if ids.size and ids.max() == _NO_NUCLEOTIDE:
            index = int(np.argmax(ids))
            if isinstance(text, bytes):
                text = text.translate(None, skip).decode("latin-1")
            raise UserError(
                f"{text[index]!r} at position {first + index:,} is not a nucleotide code "
                f"(one of {BASES} or, read as N, {IUPAC_AMBIGUOUS})"
            )
        return ids

    def decode(self, ids: np.ndarray) -> str:
        """Returns the letters of token ids; other tokens appear as names, such as [PAD] and [EOD].

        Raises UserError if an id is out of range.
        """
        ids = np.asarray(ids)
        if ids.size and not 0 <= ids.min() <= ids.max() < len(_NAMES):
            raise UserError(f"token ids must lie between 0 and {EOD}, not {ids.min()}..{ids.max()}")
        return "".join(_NAMES[ids])

    @staticmethod
    def check_sentencepiece(path: Path) -> None:
        """Raises UserError unless the SentencePiece model at `path` has exactly our ids."""
        import sentencepiece  # imported here because data preparation does not need it

        if not Path(path).is_file():
            raise UserError(f"{path}: there is no such SentencePiece model")
        try:
            model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError):
            raise UserError(f"{path} is not a SentencePiece model") from None
        pieces = [model.id_to_piece(number) for number in range(len(model))]
        for number, (piece, expected) in enumerate(zip_longest(pieces, PIECES)):
            if expected is None:
                raise UserError(
                    f"{path}: piece {piece} has id {number}, "
                    f"but only ids 0 to {len(PIECES) - 1} are expected"
                )
            if piece != expected:
                actual = f"has id {pieces.index(expected)}" if expected in pieces else "is missing"
                raise UserError(f"{path}: piece {expected} {actual}; its id must be {number}")
