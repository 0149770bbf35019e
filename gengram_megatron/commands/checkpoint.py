"""The command `gengram checkpoint`: inspect, verify, strip, export and import checkpoints."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
    find_checkpoint,
    read_checksums,
    reading,
)

if TYPE_CHECKING:  # its import is slow
    from gengram_megatron.engine.exchange.importing import ForeignModel

DAMAGED = 1
"""Exit code of `verify` if a checkpoint is damaged."""


def verify(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="PATH",
            help="A checkpoint, or the folder of a run, to verify all of its checkpoints.",
            show_default=False,
        ),
    ],
) -> None:
    """Compare all files of checkpoints with their checksums.

    Also checks that every file named in the checkpoint's list of tensors exists. Reports what is
    wrong, and exits with code 1 if anything is. Training makes the same check on the checkpoint
    that it resumes from, and uses the previous one if it is damaged.
    """
    checkpoints = checkpoints_at(path)
    if not checkpoints:
        raise UserError(f"{path} is neither a checkpoint nor the folder of a run that has any")
    from gengram_megatron.engine.checkpoint.stored import missing_files

    # missing_files reads the list of tensors, so it is not called if that may be damaged.
    damaged = {
        checkpoint: damage(checkpoint) or missing_files(checkpoint) for checkpoint in checkpoints
    }
    for checkpoint, problems in damaged.items():
        for problem in problems:
            print(f"{checkpoint}: {problem}")
        if not problems:
            print(f"{checkpoint}: whole, {len(read_checksums(checkpoint))} files")
    if any(damaged.values()):
        raise typer.Exit(DAMAGED)


app = typer.Typer(
    help="Inspect, verify, strip, export and import checkpoints.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.command()(verify)

Checkpoint = Annotated[
    Path,
    typer.Argument(
        metavar="PATH",
        help="A checkpoint, or the folder of a run, to use its newest one.",
        show_default=False,
    ),
]


def _whole_checkpoint(path: Path) -> Path:
    """Returns the checkpoint that PATH means, after all its files were read and compared."""
    with reading(path):
        checkpoint = find_checkpoint(path)
        check_readable(checkpoint.iterdir())
        check_whole(checkpoint)
    return checkpoint


@app.command()
def inspect(
    path: Checkpoint,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON, which includes the config of the run.")
    ] = False,
) -> None:
    """Show what a checkpoint contains, without loading its tensors.

    Step, tokens, the layout that wrote it, parameters by module, Gengram tables and sizes.
    """
    from gengram_megatron.engine.checkpoint.summary import show, summary

    with reading(path):
        facts = summary(find_checkpoint(path))
    if as_json:
        print(json.dumps(facts, indent=1))
    else:
        show(facts)


@app.command()
def strip(
    path: Checkpoint,
    out: Annotated[
        Path,
        typer.Argument(
            metavar="OUT", help="The folder to write the checkpoint into.", show_default=False
        ),
    ],
) -> None:
    """Copy a checkpoint without its optimizer states.

    The copy has a quarter of the size or less. It can be inspected and exported, and a new run can
    start from its weights (checkpoint.load), but the run itself cannot resume from it. PATH is not
    changed.
    """
    check_folder_writable(out)
    from gengram_megatron.engine.checkpoint.weights_only import strip as strip_checkpoint

    print(strip_checkpoint(_whole_checkpoint(path), out))


@app.command()
def export(
    path: Checkpoint,
    out: Annotated[
        Path,
        typer.Argument(metavar="OUT", help="The new folder to write.", show_default=False),
    ],
    largest_file: Annotated[
        float, typer.Option(min=1e-6, max=5, help="Maximum gigabytes of weights in one file.")
    ] = 5,
) -> None:
    """Write a model for Hugging Face's transformers.

    The folder holds safetensors, configs, the tokenizer and a model card. A model without Gengram
    becomes a standard Llama (dense) or Mixtral (experts). A model with Gengram includes its code
    and is loaded with trust_remote_code=True. Models with MLA, and those that route a token to a
    single expert, are refused. Needs the extra hf.

    \b
      gengram checkpoint export runs/mine exported
      python -c 'from transformers import AutoModelForCausalLM as Model
      Model.from_pretrained("exported", trust_remote_code=True)'
    """
    check_folder_writable(out.parent)
    from gengram_megatron.engine.exchange.export import export as export_checkpoint

    checkpoint = _whole_checkpoint(path)
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
            help="Write a config that fits the model to the new file FILE, and import with it.",
            show_default=False,
        ),
    ] = None,
    print_config: Annotated[
        bool,
        typer.Option("--print-config", help="Only print a config that fits the model."),
    ] = False,
) -> None:
    """Import weights of another format, for a run to start from.

    PATH is a model folder of transformers (a Llama or Mixtral, or one that `gengram checkpoint
    export` wrote), or a checkpoint of Megatron-LM (its folder, or that of one iteration; files of
    tensor-, pipeline- and expert-parallel ranks, or torch_dist), with or without the published
    Gengram code.

    \b
      gengram checkpoint import megatron/iter_0001000 --print-config
      gengram checkpoint import megatron/iter_0001000 --new-config my_run.yaml run.dir=runs/mine
      gengram checkpoint import megatron/iter_0001000 my_run.yaml run.dir=runs/mine

    --new-config writes a config from the model's own settings; then set its data.path and how long
    it trains (train.steps or train.samples). Otherwise CONFIG must describe the same model. In both
    cases run.dir names the new run's folder: `gengram train` with the same config then starts at
    step 0 from these weights.

    If the model is not the one of the config, it is refused with a table of the settings that
    differ: the sizes, and everything else that changes what the same weights compute.
    """
    file = None if config is None or "=" in config else Path(config)
    words = [word for word in (config, *(overrides or [])) if word is not None]
    if print_config or new_config:
        option = "--print-config" if print_config else "--new-config"
        if file is not None:
            raise UserError(
                f"CONFIG {file} and {option} are both given: leave out CONFIG, because {option} "
                "makes the config, or leave out that option"
            )
        if print_config and new_config:
            raise UserError("--print-config and --new-config are both given: give one of them")
    if print_config:
        _print_config(path, words)
    elif new_config:
        _import_with_new_config(path, new_config, words)
    elif file is None:
        raise UserError(
            "CONFIG is missing: name a config that describes the model, or let --new-config FILE "
            "write one"
        )
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
    """Writes the file last, so that it exists only if the checkpoint does."""
    if file.exists():
        raise UserError(
            f"--new-config {file} already exists: give another name, or give it as CONFIG"
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


def _opened(path: Path) -> "ForeignModel":
    """Opens a model of another format, and shows its warnings."""
    from gengram_megatron.engine.exchange.importing import open_foreign

    foreign = open_foreign(path)
    for line in foreign.warnings:
        print_message(f"warning: {line}")
    return foreign
