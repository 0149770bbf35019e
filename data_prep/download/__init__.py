"""`gengram-data download`: genomes and their annotations from where they are published."""
