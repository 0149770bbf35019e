"""The command `gengram checkpoint`: look at checkpoints, and carry them in and out."""

import json
from pathlib import Path
from typing import Annotated

import typer

from gengram_megatron.checkpoint.access import check_readable, reading
from gengram_megatron.checkpoint.checksums import check_whole
from gengram_megatron.checkpoint.verify import verify
from gengram_megatron.config.arguments import ConfigFile, Overrides
from gengram_megatron.config.load import load_config
from gengram_megatron.config.schema import Config
from gengram_megatron.files import check_folder_writable

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
    from gengram_megatron.checkpoint.stored import find_checkpoint
    from gengram_megatron.checkpoint.summary import show, summary

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
    from gengram_megatron.checkpoint.stored import find_checkpoint
    from gengram_megatron.checkpoint.weights_only import strip as strip_checkpoint

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
    from gengram_megatron.checkpoint.exchange.export import export as export_checkpoint
    from gengram_megatron.checkpoint.stored import find_checkpoint

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
    config: ConfigFile,
    overrides: Overrides = None,
) -> None:
    """Let a run start from the weights of another format.

    PATH is what `gengram checkpoint export` wrote, or a checkpoint of Megatron-LM (its folder, or
    that of one iteration; files of tensor- and pipeline-parallel ranks, or a distributed one),
    with or without the Gengram code published for it. CONFIG describes the model that is there, and
    names the new run's folder as run.dir: `gengram train` with the same CONFIG then starts at step
    0 from these weights. A model other than CONFIG's is refused.
    """
    loaded = load_config(config, overrides or [], Config)
    check_folder_writable(Path(loaded.run.dir) / "checkpoints")
    from gengram_megatron.checkpoint.exchange.importing import import_model

    print(import_model(path, loaded))
