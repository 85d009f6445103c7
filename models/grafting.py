"""What marks a module as grafted into a trunk, so that freezing the trunk leaves it alone."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn


class Graft(nn.Module):
    """Base of modules that are inserted into a trunk's blocks: trained, and in training mode, when the trunk is not."""


def trunk_modules(root: nn.Module) -> Iterator[nn.Module]:
    """Every module under ``root``, itself included, that is neither a graft nor inside one."""
    if isinstance(root, Graft):
        return
    yield root
    for child in root.children():
        yield from trunk_modules(child)


def trunk_parameters(root: nn.Module) -> Iterator[nn.Parameter]:
    """Every parameter under ``root`` that belongs to no graft."""
    for module in trunk_modules(root):
        yield from module.parameters(recurse=False)
