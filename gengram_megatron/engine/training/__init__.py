"""A training run; `run.py` reads from top to bottom."""
