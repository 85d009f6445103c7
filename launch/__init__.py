"""Command line, run directories and the launching of roles. Only this package starts or signals processes."""
