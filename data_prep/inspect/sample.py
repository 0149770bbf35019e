"""From a sample's number back to the bases that it is made of."""

from typing import Any

from data_prep.inspect.opened import DataSet
from gengram_megatron.errors import UserError
from gengram_megatron.tokenizer import DnaTokenizer

SHOWN = 60  # bases from each end


def locate(data: DataSet, split: str, number: int) -> dict[str, Any]:
    """Where a sample of a split comes from, and how it begins and ends.

    `start` and `end` count from 0, half-open, on the forward strand; `region` says the same for
    samtools, which counts from 1 with both ends included. The bases are as stored: those of the
    reverse complement where `strand` is "-".
    """
    opened = data.split(split, scattered=True)
    count = len(opened.origins)
    if not 0 <= number < count:
        raise UserError(
            f"there is no sample {number} in split {split} of {data.folder}; "
            + (f"it has samples 0 to {count - 1}" if count else "it has none")
        )
    record, start, strand = opened.origins[number].item()
    if record >= len(data.sequences):
        raise UserError(
            f"{data.folder} is damaged: sample {number} of {split} is of sequence {record}, and "
            f"there are {len(data.sequences)}; gengram-data verify says more"
        )
    sequence, end = data.sequences[record], start + data.seq_length
    bases = DnaTokenizer().decode(opened.tokens[number, :-1])
    return {
        "sample": number,
        "split": split,
        "source": sequence.source,
        "fasta": data.facts.sources[sequence.source].fasta,
        "sequence": sequence.name,
        "sequence_bases": sequence.bases,
        "start": start,
        "end": end,
        "region": f"{sequence.name}:{start + 1}-{end}",
        "strand": strand.decode(),
        "first_bases": bases[:SHOWN],
        "last_bases": bases[-SHOWN:],
    }
