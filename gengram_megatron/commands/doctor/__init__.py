"""The checks of `gengram doctor` on a machine and a config.

The command's own process does not import torch. Everything that may be broken is run in separate
processes (ask.py), so that a package that fails, or kills its process, is only reported.

ask: runs these processes, and lists the versions of software; machine: devices and speeds, in a
separate process; built: the parts of a small model, in a separate process; fit: whether the run
fits on this machine, why its parts are the ones they are, and advice; examine: runs all checks;
command: prints what they found.
"""
