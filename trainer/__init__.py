"""The roles that run after launch: train, checkpoint, evaluate; tasks and monitoring."""
