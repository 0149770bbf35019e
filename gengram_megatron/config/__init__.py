"""Config files: the schema, loading, and the checks between keys."""
