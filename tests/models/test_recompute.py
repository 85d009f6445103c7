"""Activation checkpointing changes memory, and nothing else."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from model_samples import ADAPTFORMER, HEADS, PYRAMID, batch_of, loss_of, model_of
from torch import Tensor, nn

from vitgraft.models.build import GraftedModel
from vitgraft.models.norms import frozen_batchnorm
from vitgraft.models.recompute import Policy, apply_recompute


def train_step(model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor], int]:
    """Loss, gradients, state after a step, and the bytes kept for the backward pass."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    torch.manual_seed(11)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_of(model(**batch))
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), gradients, {k: v.clone() for k, v in model.state_dict().items()}, sum(kept.values())


def models_of(head: str, policy: Policy, **options: Any) -> tuple[GraftedModel, GraftedModel]:
    plain = model_of(head, **options).train()
    recomputed = copy.deepcopy(plain)
    names = list(plain.state_dict())
    apply_recompute(recomputed.recompute_units(), policy)
    assert list(recomputed.state_dict()) == names
    return plain, recomputed


def assert_same(plain: GraftedModel, recomputed: GraftedModel, batch: dict[str, Any]) -> tuple[int, int]:
    loss, gradients, state, kept = train_step(plain, batch)
    loss_2, gradients_2, state_2, kept_2 = train_step(recomputed, batch)
    assert torch.equal(loss, loss_2)
    assert gradients.keys() == gradients_2.keys()
    for name, gradient in gradients.items():
        # fairscale's backward pass adds the gradients of a map that several modules read in another order.
        atol = 5e-6 * gradient.abs().max().item() + 1e-9
        torch.testing.assert_close(gradients_2[name], gradient, rtol=0, atol=atol, msg=name)
    for name, tensor in state.items():
        assert torch.equal(state_2[name], tensor), name
    return kept, kept_2


@pytest.mark.parametrize("policy", ["full", "offload"])
@pytest.mark.parametrize("head", HEADS)
def test_losses_gradients_and_statistics_are_the_same(head: str, policy: Policy) -> None:
    # Drop path and dropout, so that the random numbers of the recomputation matter; BatchNorm, so that its updates do.
    options: dict[str, Any] = {"backbone": {"drop_path": 0.5}}
    if head == "upernet":
        options |= {"norm": "bn", "dropout": 0.3, "adapter": [PYRAMID | {"norm": "bn"}]}
    plain, recomputed = models_of(head, policy, **options)
    for seed in range(2):
        kept, kept_recomputed = assert_same(plain, recomputed, batch_of(head, seed=seed))
        if policy == "full":
            assert kept_recomputed < 0.9 * kept


def test_none_and_no_grad_change_nothing() -> None:
    plain, same = models_of("upernet", "none")
    assert_same(plain, same, batch_of("upernet"))
    _, recomputed = models_of("upernet", "full")
    batch = batch_of("upernet")
    with torch.no_grad():
        result = recomputed.eval()(batch["images"], batch["sizes"])
    assert torch.equal(result, plain.eval()(batch["images"], batch["sizes"]))


def test_a_frozen_trunk_with_grafts() -> None:
    options: dict[str, Any] = {"adapter": [ADAPTFORMER, PYRAMID], "backbone": {"frozen": True, "drop_path": 0.5}}
    plain, recomputed = models_of("upernet", "full", **options)
    for model in (plain, recomputed):
        torch.manual_seed(2)
        for name, parameter in model.named_parameters():
            if ".up_proj." in name:
                nn.init.normal_(parameter, std=0.1)
    assert_same(plain, recomputed, batch_of("upernet"))


def test_a_backward_pass_outside_of_frozen_batchnorm() -> None:
    plain, recomputed = models_of("upernet", "full", norm="bn")
    batch = batch_of("upernet")
    gradients = []
    for model in (plain, recomputed):
        model(**batch)  # statistics that differ from the start's
        with frozen_batchnorm(model):
            loss = loss_of(model(**batch))
        loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-6, atol=1e-8, msg=name)


def test_under_autocast() -> None:
    plain, recomputed = models_of("upernet", "full")
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(plain, recomputed, batch_of("upernet"))
