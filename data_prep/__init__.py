"""From FASTA files to a data set that megatron-core reads.

The path of a base: `fasta` reads it, `fragment` lays the grid, `split`, `genes` and `mix` decide
each fragment's fate, and `write` stores it, perhaps as its reverse complement. `build` calls them
in that order.
"""
