"""Genomes through JSON lines and SentencePiece to an IndexedDataset, as one does without
gengram-data.

    python benchmarks/json_pipeline.py FASTA ... --out FOLDER [--seq-length 8192] [--workers 2]

What data_preparation.py compares with. The way of Megatron-LM's own tool, with its parts: a file of
JSON lines, a fragment each; a pool of processes that parse a line and tokenize its text; one
process that appends the lists of ids they send to megatron-core's IndexedDatasetBuilder, in the
smallest type that Megatron has for the vocabulary. The SentencePiece model is of single characters
without normalization, the fastest kind for DNA. Prints as JSON the seconds of the two halves,
without those that it takes to load torch and megatron-core.
"""

import argparse
import io
import json
import multiprocessing
import time
from collections.abc import Iterator
from pathlib import Path

import dnaio
import sentencepiece

LINES_A_TASK = 32
VOCABULARY = 20  # at most; there are five letters and two special pieces

_tokenizer: sentencepiece.SentencePieceProcessor


def fragments(paths: list[Path], seq_length: int) -> Iterator[str]:
    """The whole fragments of all records, upper case."""
    for path in paths:
        with dnaio.open(path, fileformat="fasta") as reader:
            for record in reader:
                text = record.sequence.upper()
                for start in range(0, len(text) - seq_length + 1, seq_length):
                    yield text[start : start + seq_length]


def write_json_lines(paths: list[Path], seq_length: int, out: Path) -> None:
    """One fragment a line."""
    with out.open("w") as file:
        for text in fragments(paths, seq_length):
            file.write(json.dumps({"text": text}) + "\n")


def train_model() -> bytes:
    """A SentencePiece model whose pieces are A, C, G, T and N."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["ACGTN"]),
        model_writer=model,
        model_type="char",
        vocab_size=VOCABULARY,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        bos_id=-1,
        eos_id=-1,
        minloglevel=3,
    )
    return model.getvalue()


def tokenize(lines: Path, out: Path, workers: int) -> None:
    """JSON lines to `<out>.bin` and `<out>.idx`."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    model = train_model()
    pieces = len(sentencepiece.SentencePieceProcessor(model_proto=model))
    builder = IndexedDatasetBuilder(f"{out}.bin", dtype=DType.optimal_dtype(pieces + 1))
    with lines.open() as file, multiprocessing.Pool(workers, _start, (model,)) as pool:
        for ids in pool.imap(_encode, file, LINES_A_TASK):
            builder.add_document(ids, [len(ids)])
    builder.finalize(f"{out}.idx")


def _start(model: bytes) -> None:
    """Give a process its tokenizer."""
    global _tokenizer
    _tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model)


def _encode(line: str) -> list[int]:
    """The ids of a line's text, and the end of the document after the last piece."""
    return [*_tokenizer.encode(json.loads(line)["text"]), len(_tokenizer)]


def main() -> None:
    """Run both halves."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("fasta", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="folder, made if it is not there")
    parser.add_argument("--seq-length", type=int, default=8192)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    lines = arguments.out / "fragments.jsonl"
    start = time.perf_counter()
    write_json_lines(arguments.fasta, arguments.seq_length, lines)
    middle = time.perf_counter()
    tokenize(lines, arguments.out / "train", arguments.workers)
    print(json.dumps({"json_lines": middle - start, "tokenize": time.perf_counter() - middle}))


if __name__ == "__main__":
    main()
