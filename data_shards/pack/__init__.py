"""Packing: labelled data sets in their usual formats, and the built-in digits, into shards."""
