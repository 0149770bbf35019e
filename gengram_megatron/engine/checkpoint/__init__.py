"""Checkpoints: `state.py` saves and loads a run, `contents.py` and `zero.py` say what they hold."""
