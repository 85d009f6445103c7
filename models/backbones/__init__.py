"""Trunks: plain Vision Transformers behind one interface."""
