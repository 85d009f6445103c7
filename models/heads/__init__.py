"""Heads on the feature maps: losses by name in training, predictions otherwise."""
