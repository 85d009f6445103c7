"""Trunks, adapters, heads and their parts. Plain nn.Modules: no distributed code beyond SyncBatchNorm."""
