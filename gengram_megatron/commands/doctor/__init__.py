"""What `gengram doctor` finds out about a machine and a config.

The command's own process imports no torch: whatever may be broken here is asked of processes of
their own (ask.py), so that a package that fails, or kills its process, is reported and no more.

software: versions; devices, built, product, all_reduce: the processes that are asked; sample: the
small model whose parts are looked at; parts: what they are, and why no faster ones; fit: whether
the run fits on this machine; disk: its folder; examine: all of it; advice, show: for people.
"""
