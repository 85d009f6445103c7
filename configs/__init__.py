"""Typed recipes: the schema, the loader with its one-line errors, and the recipes themselves."""
