"""`python -m data_prep` is the command `gengram-data`."""

from data_prep.cli import main

if __name__ == "__main__":
    main()
