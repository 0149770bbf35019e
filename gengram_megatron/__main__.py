"""The program `gengram`, also run as `python -m gengram_megatron`, for example by torchrun."""

import signal


def main() -> None:
    """Imports the commands, and runs the requested one."""
    # During the imports Ctrl-C simply ends the process, as SIGTERM does. Python's default handler
    # would show a traceback of the imports.
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # it is not if a background shell ignores SIGINT
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from gengram_megatron.commands.cli import main as run_command

    signal.signal(signal.SIGINT, before)
    run_command()


if __name__ == "__main__":  # helper processes of checkpoints import this file again
    main()
