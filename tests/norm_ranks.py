"""What each process of the two-rank norm test runs: importable by name, as a spawned process needs it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitgraft.models.norms import BatchNorm, convert_sync_batchnorm, make_norm

CHANNELS = 6


def sample_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, CHANNELS, 3), make_norm("syncbn", CHANNELS), nn.Conv2d(CHANNELS, 4, 1), make_norm("bn", 4)
    )


def step(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Two training steps' worth of statistics; output and gradients of the second."""
    model[:2](x)
    x = x.clone().requires_grad_()
    y = model[:2](x)
    (y * torch.arange(y[0].numel()).reshape(y[0].shape).cos()).sum().backward()
    results = {"output": y.detach(), "input": x.grad}
    results |= {name: p.grad for name, p in model[:2].named_parameters()}
    return results | dict(model[:2].named_buffers())


def rank_main(rank: int, folder: str, parts: list[Tensor]) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=len(parts))
    model = sample_model()
    names = list(model.state_dict())
    parameters = dict(model.named_parameters())
    model = convert_sync_batchnorm(model, torch.device("cpu"), len(parts))
    assert list(model.state_dict()) == names
    assert all(parameters[name] is p for name, p in model.named_parameters())
    assert type(model[3]) is BatchNorm  # bn stays this rank's own
    torch.save(step(model, parts[rank]), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()
