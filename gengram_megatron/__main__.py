"""The program `gengram`, also as `python -m gengram_megatron`, which is what torchrun starts."""

import signal


def main() -> None:
    """Import the commands, and run the one that is asked for."""
    # Nothing has begun while they are imported, so Ctrl-C just ends the process, as SIGTERM does.
    # Python's own handler would show a traceback of the imports.
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # not where a shell in the background ignores it
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from gengram_megatron.commands.cli import main as run_command

    signal.signal(signal.SIGINT, before)
    run_command()


if __name__ == "__main__":  # helper processes of checkpoints import this file again
    main()
