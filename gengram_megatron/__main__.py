"""`python -m gengram_megatron`, which is what torchrun starts."""

from gengram_megatron.cli import main

if __name__ == "__main__":  # helper processes of checkpoints import this file again
    main()
