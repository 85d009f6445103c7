"""Grafts on a trunk, and adapters that make feature maps of several strides from it."""
