"""What reads the maps: losses by name in training, predictions otherwise."""
