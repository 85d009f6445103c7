"""Normalisation of 2-d maps: which kind, over how many ranks, and with which statistics.

All kinds compute in float32 whatever the precision of their input, and return the input's precision.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from vitgraft.configs.schema.model import Norm


def make_norm(kind: Norm, channels: int) -> nn.Module:
    """A norm for maps (B, channels, H, W).

    ln: LayerNorm over the channels of each place (eps 1e-6). gn: GroupNorm with 32 groups, or the largest number below
    that divides the channels into groups of at least two (one channel at one place would always become zero).
    bn: BatchNorm over this rank's batch. syncbn: the same until :func:`convert_sync_batchnorm` makes it span the ranks.
    """
    if kind == "ln":
        return ChannelLayerNorm(channels)
    if kind == "gn":
        most = max(1, min(32, channels // 2))
        groups = next(groups for groups in range(most, 0, -1) if channels % groups == 0)
        return GroupNorm(groups, channels)
    return BatchNorm(channels, synchronised=kind == "syncbn")


class ChannelLayerNorm(nn.Module):
    """LayerNorm over the channels of maps (B, C, H, W), for each place on its own."""

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            last = x.float().permute(0, 2, 3, 1)
            last = F.layer_norm(last, last.shape[-1:], self.weight.float(), self.bias.float(), self.eps)
            return last.permute(0, 3, 1, 2).to(x.dtype)


class GroupNorm(nn.GroupNorm):
    """GroupNorm in float32."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            weight, bias = self.weight.float(), self.bias.float()
            return F.group_norm(x.float(), self.num_groups, weight, bias, self.eps).to(x.dtype)


class BatchNorm(nn.BatchNorm2d):
    """BatchNorm over this rank's batch; ``synchronised`` marks it for :func:`convert_sync_batchnorm`.

    A batch with a single value per channel has no variance: it is normalised by the running statistics and leaves them
    as they are (torch's own raises). That happens to maps pooled to one place when a rank has one image.

    The running statistics stay float32 when the module's precision is changed: bfloat16 cannot hold a slow average.
    """

    def __init__(self, channels: int, *, synchronised: bool = False, eps: float = 1e-5, affine: bool = True) -> None:
        super().__init__(channels, eps=eps, affine=affine)
        self.synchronised = synchronised

    def forward(self, x: Tensor) -> Tensor:
        of_batch = self.training and x.numel() > x.shape[1]
        if of_batch and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        # Whoever recomputes activations may switch the tracking off for one of the two passes.
        tracked = not of_batch or self.track_running_stats
        mean, var = (self.running_mean, self.running_var) if tracked else (None, None)
        with torch.autocast(x.device.type, enabled=False):
            weight, bias = (self.weight.float(), self.bias.float()) if self.affine else (None, None)
            return F.batch_norm(x.float(), mean, var, weight, bias, of_batch, self.momentum or 0.0, self.eps).to(
                x.dtype
            )

    def _apply(self, fn: Any, recurse: bool = True) -> BatchNorm:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        assert self.running_mean is not None
        assert self.running_var is not None
        self.running_mean, self.running_var = self.running_mean.float(), self.running_var.float()
        return self


def unsynchronised_statistics(model: nn.Module) -> list[Tensor]:
    """The running statistics of every BatchNorm that looks at its own rank's batch only."""
    loose = [module for module in model.modules() if isinstance(module, BatchNorm)]
    return [buffer for module in loose for buffer in module.buffers()]


def convert_sync_batchnorm(model: nn.Module, device: torch.device, process_group_world: int) -> nn.Module:
    """Make every norm of kind ``syncbn`` in ``model`` take its statistics over all ranks of the default process group.

    torch's SyncBatchNorm on CUDA; fairscale's on a CPU, where torch's refuses to run. With one rank the model stays as
    it is. Works in place, keeps the names in the state dict and the parameters themselves, and returns the model.
    """
    if process_group_world == 1:
        return model
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, BatchNorm) and child.synchronised:
                setattr(parent, name, _synchronised(child, device))
    return model


def _synchronised(norm: BatchNorm, device: torch.device) -> nn.Module:
    kind: Any = torch.nn.SyncBatchNorm
    if device.type != "cuda":
        # Imported only where it is needed: fairscale's import takes a while and warns about torch's deprecations.
        from vitgraft.models.cpu_sync_batchnorm import CPUSyncBatchNorm

        kind = CPUSyncBatchNorm
    twin: nn.Module = kind(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    twin.weight, twin.bias = norm.weight, norm.bias
    for name, buffer in norm.named_buffers(recurse=False):
        setattr(twin, name, buffer)
    return twin.train(norm.training)


def batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """Every BatchNorm of any kind in ``model``."""
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


@contextmanager
def frozen_batchnorm(model: nn.Module) -> Iterator[None]:
    """Inside, every BatchNorm of ``model`` uses its running statistics and leaves them as they are.

    For a micro-step in which some ranks have no samples: their fillers must not reach the statistics. Where
    activations are recomputed by the ``offload`` policy, the backward pass belongs inside too (``full`` remembers how
    the forward pass ran).
    """
    norms = [norm for norm in batch_norms(model) if norm.training]
    for norm in norms:
        norm.training = False
    try:
        yield
    finally:
        for norm in norms:
            norm.training = True
