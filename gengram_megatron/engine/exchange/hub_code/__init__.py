"""Files that go into an exported model with memory, for transformers' `trust_remote_code`. They
stand alone: nothing here imports the package, and nothing of the package imports them."""
