"""Packing: COCO, label maps, video lists and the built-in digits into shards."""
