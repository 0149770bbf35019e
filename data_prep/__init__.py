"""From FASTA files to a data set that megatron-core reads.

The way of a base: `fasta` reads it, `fragment` lays the grid, `split` and `mix` decide each
fragment's fate, `write` stores it. `build` calls them in that order.
"""
