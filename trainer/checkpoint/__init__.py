"""Checkpoints: named flat vectors in safetensors shards, committed atomically, verified by SHA-256."""
