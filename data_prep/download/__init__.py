"""`gengram-data download`: fetches genomes and their annotations from where they are published."""
