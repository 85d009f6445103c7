"""Activation checkpointing by policy: recompute a module's activations in the backward pass, or keep them elsewhere.

full: torch's non-reentrant checkpointing. offload: fairscale's checkpoint wrapper, which also moves the inputs of each
module to the CPU. Both replace the ``forward`` of the module itself, so no name in the state dict changes, and both do
nothing where gradients are disabled. Random numbers are the same in the recomputation, and BatchNorm's statistics are
updated once.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from vitgraft.models.norms import batch_norms

Policy = Literal["none", "full", "offload"]


def apply_recompute(modules: Iterable[nn.Module], policy: Policy) -> None:
    """Make each of ``modules`` (none inside another) recompute its activations under ``policy``, in place.

    ``offload`` does not work under CPU autocast (a recipe that asks for it is refused), and a deep copy made after it
    would run the original's modules: copy first.
    """
    for module in modules:
        if policy == "full":
            # A partial of the bound method survives copy.deepcopy; a closure over the module would not.
            module.forward = functools.partial(_recomputed, module.forward)
        elif policy == "offload":
            _offload(module)


def _recomputed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    module: nn.Module = forward.__self__  # type: ignore[attr-defined]
    contexts = functools.partial(_contexts, batch_norms(module))
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=True, context_fn=contexts, **kwargs)


def _contexts(norms: list[_BatchNorm]) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return the contexts of the forward pass and the recomputation; called before the forward pass."""
    modes = [norm.training for norm in norms]
    return nullcontext(), _recomputing(norms, modes)


@contextmanager
def _recomputing(norms: list[_BatchNorm], modes: list[bool]) -> Iterator[None]:
    """BatchNorms normalise as they did in the forward pass (``modes``), and their statistics stay as they are.

    Momentum 0 keeps the running statistics; taking them away would change which tensors the backward pass has saved.
    """
    before = [(norm.training, norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm, mode in zip(norms, modes, strict=True):
        norm.training, norm.momentum, norm.num_batches_tracked = mode, 0.0, None
    try:
        yield
    finally:
        for norm, (mode, momentum, tracked) in zip(norms, before, strict=True):
            norm.training, norm.momentum, norm.num_batches_tracked = mode, momentum, tracked


def _offload(module: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # fairscale still calls what torch has renamed
        from fairscale.nn.checkpoint import checkpoint_wrapper
    checkpoint_wrapper(module, offload_to_cpu=True)
