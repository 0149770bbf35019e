"""The commands of `gengram`, one file each; `cli.py` puts them together."""
