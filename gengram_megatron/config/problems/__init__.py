"""Checks between keys: each function yields a sentence for each thing that cannot work."""
