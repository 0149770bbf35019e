"""The command `gengram checkpoint`: look at checkpoints, verify them, and carry them in and out."""

import json
from pathlib import Path
from typing import Annotated

import typer

from gengram_megatron.config.command_line import Overrides
from gengram_megatron.config.load import load_config
from gengram_megatron.config.schema import Config
from gengram_megatron.errors import UserError, print_message
from gengram_megatron.files import check_folder_writable, check_writable, replacing
from gengram_megatron.runs.store import (
    check_readable,
    check_whole,
    checkpoints_at,
    damage,
    read_checksums,
    reading,
)

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

    Also looks whether all files are there that the checkpoint's own list of tensors names. Names
    what is wrong, and exits with code 1 if anything is. Training does the same with the checkpoint
    that it goes on from, and takes the one before if it is damaged.
    """
    found = checkpoints_at(path)
    if not found:
        raise UserError(f"{path} is no checkpoint, and no folder of a run that has any")
    from gengram_megatron.engine.checkpoint.stored import missing_files

    # A damaged list of tensors is not worth reading.
    damaged = {checkpoint: damage(checkpoint) or missing_files(checkpoint) for checkpoint in found}
    for checkpoint, problems in damaged.items():
        for problem in problems:
            print(f"{checkpoint}: {problem}")
        if not problems:
            print(f"{checkpoint}: whole, {len(read_checksums(checkpoint))} files")
    if any(damaged.values()):
        raise typer.Exit(DAMAGED)


app = typer.Typer(
    help="Look at checkpoints, and carry them in and out.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.command()(verify)

Checkpoint = Annotated[
    Path,
    typer.Argument(
        metavar="PATH",
        help="A checkpoint, or the folder of a run, whose newest is meant.",
        show_default=False,
    ),
]


@app.command()
def inspect(
    path: Checkpoint,
    as_json: Annotated[
        bool, typer.Option("--json", help="For programs; with the config of the run.")
    ] = False,
) -> None:
    """Say what a checkpoint holds, without loading its tensors.

    Step, tokens, the layout that wrote it, parameters by module, memory tables and sizes.
    """
    from gengram_megatron.engine.checkpoint.stored import find_checkpoint
    from gengram_megatron.engine.checkpoint.summary import show, summary

    with reading(path):
        found = summary(find_checkpoint(path))
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        show(found)


@app.command()
def strip(
    path: Checkpoint,
    out: Annotated[
        Path,
        typer.Argument(
            metavar="OUT", help="Folder of checkpoints to write to.", show_default=False
        ),
    ],
) -> None:
    """Copy a checkpoint without its optimizer, a quarter or less of its size.

    What remains can be inspected and exported, and a new run can start from its weights
    (checkpoint.load); the run itself cannot go on from it. PATH stays as it is.
    """
    check_folder_writable(out)
    from gengram_megatron.engine.checkpoint.stored import find_checkpoint
    from gengram_megatron.engine.checkpoint.weights_only import strip as strip_checkpoint

    with reading(path):
        checkpoint = find_checkpoint(path)
        check_readable(checkpoint.iterdir())
        check_whole(checkpoint)
    print(strip_checkpoint(checkpoint, out))


@app.command()
def export(
    path: Checkpoint,
    out: Annotated[
        Path,
        typer.Argument(metavar="OUT", help="The folder to write, a new one.", show_default=False),
    ],
    largest_file: Annotated[
        float, typer.Option(min=1e-6, max=5, help="Gigabytes of weights in one file at most.")
    ] = 5,
) -> None:
    """Write a model for Hugging Face's transformers: safetensors, configs, tokenizer, model card.

    A model without memory becomes a stock Llama (dense) or Mixtral (experts). One with Gengram
    memory brings its code along and is loaded with trust_remote_code=True. Models with MLA, and
    those that send a token to a single expert, are refused. Needs the extra hf.

    \b
      gengram checkpoint export runs/mine exported
      python -c 'from transformers import AutoModelForCausalLM as Model
      Model.from_pretrained("exported", trust_remote_code=True)'
    """
    check_folder_writable(out.parent)
    from gengram_megatron.engine.checkpoint.stored import find_checkpoint
    from gengram_megatron.engine.exchange.export import export as export_checkpoint

    with reading(path):
        checkpoint = find_checkpoint(path)
        check_readable(checkpoint.iterdir())
        check_whole(checkpoint)
    export_checkpoint(checkpoint, out, int(largest_file * 1e9))
    print(f"wrote {out} from {checkpoint}")


@app.command(name="import")
def import_(
    path: Annotated[
        Path,
        typer.Argument(metavar="PATH", help="The model's folder.", show_default=False),
    ],
    config: Annotated[
        str | None,
        typer.Argument(
            metavar="CONFIG",
            help="The YAML file of a run; left out with --new-config and --print-config.",
            show_default=False,
        ),
    ] = None,
    overrides: Overrides = None,
    new_config: Annotated[
        Path | None,
        typer.Option(
            "--new-config",
            metavar="FILE",
            help="Write the config that the model wants to FILE, a new one, and import with it.",
            show_default=False,
        ),
    ] = None,
    print_config: Annotated[
        bool,
        typer.Option("--print-config", help="Print the config that the model wants, and no more."),
    ] = False,
) -> None:
    """Let a run start from the weights of another format.

    PATH is a folder of transformers (a Llama or Mixtral, or what `gengram checkpoint export` wrote),
    or a checkpoint of Megatron-LM (its folder, or that of one iteration; files of tensor-, pipeline-
    and expert-parallel ranks, or torch_dist), with or without the Gengram code published for it.

    \b
      gengram checkpoint import megatron/iter_0001000 --print-config
      gengram checkpoint import megatron/iter_0001000 --new-config my_run.yaml run.dir=runs/mine
      gengram checkpoint import megatron/iter_0001000 my_run.yaml run.dir=runs/mine

    A config can be written from what the model says of itself; set its data.path then, and how long
    it trains (train.steps or train.samples). Or CONFIG describes the model that is there. Either names the new run's folder as run.dir:
    `gengram train` with the same config then starts at step 0 from these weights.

    A model other than the config's is refused, with a table of the settings that differ: the sizes
    and all else that changes what the same weights compute.
    """
    file = None if config is None or "=" in config else Path(config)
    words = [word for word in (config, *(overrides or [])) if word is not None]
    if print_config or new_config:
        option = "--print-config" if print_config else "--new-config"
        if file is not None:
            raise UserError(
                f"CONFIG {file} and {option} are both given: leave out CONFIG, which would be "
                f"written, or {option}"
            )
        if print_config and new_config:
            raise UserError("--print-config and --new-config are both given: give one of them")
    elif file is None:
        raise UserError(
            "CONFIG is missing: name the config of the model that is there, or let --new-config "
            "FILE write it"
        )
    if print_config:
        _print_config(path, words)
    elif new_config:
        _import_with_new_config(path, new_config, words)
    else:
        loaded = load_config(file, words[1:], Config)
        check_folder_writable(Path(loaded.run.dir) / "checkpoints")
        from gengram_megatron.engine.exchange.importing import import_foreign

        print(import_foreign(_opened(path), loaded))


def _print_config(path: Path, words: list[str]) -> None:
    from gengram_megatron.engine.exchange.new_config import new_config

    text, _ = new_config(path, _opened(path), words)
    print(text, end="")


def _import_with_new_config(path: Path, file: Path, words: list[str]) -> None:
    """The file is written last, so that it is there only if the checkpoint is."""
    if file.exists():
        raise UserError(
            f"--new-config {file} is there already: give another name, or give it as CONFIG"
        )
    check_writable(file, "--new-config")
    from gengram_megatron.engine.exchange.importing import import_foreign
    from gengram_megatron.engine.exchange.new_config import new_config

    foreign = _opened(path)
    text, config = new_config(path, foreign, words)
    check_folder_writable(Path(config.run.dir) / "checkpoints")
    checkpoint = import_foreign(foreign, config)
    with replacing(file) as beside:
        beside.write_text(text)
    print(checkpoint)
    print(f"wrote {file}; set its data.path and how long it trains, then: gengram train {file}")


def _opened(path: Path):
    """The model, after its warnings have been shown."""
    from gengram_megatron.engine.exchange.importing import open_foreign

    foreign = open_foreign(path)
    for line in foreign.warnings:
        print_message(f"warning: {line}")
    return foreign
