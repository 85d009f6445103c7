"""Quick-start recipes: YAML files that run as they are, on the built-in digits."""
