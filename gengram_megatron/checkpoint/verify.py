"""The command `gengram checkpoint verify`: are the files what was written?"""

from pathlib import Path
from typing import Annotated

import typer

from gengram_megatron.checkpoint.checksums import damage, read_manifest
from gengram_megatron.checkpoint.store import checkpoints_at
from gengram_megatron.errors import UserError

DAMAGED = 1


def verify(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="PATH",
            help="A checkpoint, or the folder of a run, of which all are read.",
            show_default=False,
        ),
    ],
) -> None:
    """Read all files of checkpoints and compare them with their checksums.

    Also looks whether all files are there that the checkpoint's own list of tensors names. Names what is wrong, and exits with code 1 if anything is. Training does the same with the
    checkpoint that it goes on from, and takes the one before if it is damaged.
    """
    found = checkpoints_at(path)
    if not found:
        raise UserError(f"{path} is no checkpoint, and no folder of a run that has any")
    from gengram_megatron.checkpoint.stored import missing_files

    # A damaged list of tensors is not worth reading.
    damaged = {checkpoint: damage(checkpoint) or missing_files(checkpoint) for checkpoint in found}
    for checkpoint, problems in damaged.items():
        for problem in problems:
            print(f"{checkpoint}: {problem}")
        if not problems:
            print(f"{checkpoint}: whole, {len(read_manifest(checkpoint))} files")
    if any(damaged.values()):
        raise typer.Exit(DAMAGED)
