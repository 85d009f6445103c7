"""Maps made of maps."""
