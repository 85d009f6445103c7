"""BatchNorm over all ranks on a CPU, where torch's refuses to run: fairscale's, made to agree with torch's."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)  # fairscale still calls what torch has renamed
    from fairscale.experimental.nn.sync_batchnorm import SyncBatchNorm
    from fairscale.nn.checkpoint import is_recomputing


class CPUSyncBatchNorm(SyncBatchNorm):  # type: ignore[misc]
    """fairscale's SyncBatchNorm over the default process group, in float32 and with torch's count of batches."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.num_batches_tracked is not None and not is_recomputing():
            self.num_batches_tracked.add_(1)
        with torch.autocast(x.device.type, enabled=False):
            normalised: Tensor = super().forward(x.float())
            return normalised.to(x.dtype)
