"""Models of other formats: exported to them, imported from them."""
