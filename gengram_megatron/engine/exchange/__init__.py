"""Exports models to other formats and imports models from them."""
