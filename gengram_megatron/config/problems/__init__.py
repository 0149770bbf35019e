"""Checks between keys: each function yields one sentence for each problem."""
