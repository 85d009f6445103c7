"""Model FLOPs utilisation: the share of the devices' peak that a step turns into arithmetic of the model.

FLOPs are those of matrix products and convolutions, forward and backward, a multiplication with its addition being two
(arXiv 2204.02311, appendix B): what activation checkpointing computes again does not count, nor does what a frozen
trunk never computes. They are counted once, on a copy of the model without storage.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vitgraft.configs.schema import Recipe
from vitgraft.configs.schema.heads import MaskRCNNConfig
from vitgraft.models.build import GraftedModel, build_model
from vitgraft.models.heads.mask_rcnn import BOX_BINS, MASK_BINS, MaskRCNN

PEAK_TFLOPS = (
    # Dense bfloat16 on tensor cores (float16 before Ampere), from NVIDIA's data sheets; the first name that fits.
    ("B200", 2250.0),
    ("GH200", 989.4),
    ("H200", 989.4),
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.5),
    ("H100", 989.4),
    ("A100", 312.0),
    ("A40", 149.7),
    ("A30", 165.0),
    ("A10", 125.0),
    ("L40S", 362.0),
    ("L40", 181.0),
    ("L4", 121.0),
    ("V100", 125.0),
    ("T4", 65.0),
)


def peak_tflops(name: str) -> float | None:
    """The peak of a device by the name that its driver gives it; ``None`` for one that is not in the table."""
    words = name.split()
    for known, peak in PEAK_TFLOPS:
        wanted = known.split()
        starts = range(len(words) - len(wanted) + 1)
        if any(_same(words[start : start + len(wanted)], wanted) for start in starts):
            return peak
    return None


def _same(words: list[str], wanted: list[str]) -> bool:
    """``A100-SXM4-80GB`` is an A100; ``L40S`` is no L40."""
    return all(word.split("-")[0] == other for word, other in zip(words, wanted, strict=True))


@dataclass(frozen=True)
class Arithmetic:
    """What a sample costs and what the devices could do. ``flops_per_sample``: forward and backward. ``peak``: FLOP/s
    of all devices together."""

    flops_per_sample: int
    peak: float

    def utilisation(self, samples: int, seconds: float) -> float:
        """The share of the peak that ``samples`` in ``seconds`` amount to."""
        return self.flops_per_sample * samples / (seconds * self.peak)


def arithmetic_of(
    recipe: Recipe, classes: int, trained: Collection[str], device: torch.device, world: int
) -> Arithmetic | None:
    """For a run on ``world`` such devices; ``None`` where their peak is not known: on a CPU, and on a GPU that is not
    in the table, unless ``train.peak_tflops`` gives it. Counting takes a second or more, so it is done for a peak only.

    Raises:
        RuntimeError: the model computes something that depends on values and cannot be counted.
    """
    peak = recipe.train.peak_tflops
    if peak is None and device.type == "cuda":
        peak = peak_tflops(torch.cuda.get_device_name(device))
    if peak is None:
        return None
    return Arithmetic(training_flops(recipe, classes, trained), world * peak * 1e12)


def training_flops(recipe: Recipe, classes: int, trained: Collection[str]) -> int:
    """FLOPs of one sample, forward and backward.

    Args:
        classes: of the data set.
        trained: names of the parameters that are trained; no gradient of the others is computed.

    A detector is counted with as many RoIs as the recipe samples, of which the recipe's share is positive.
    """
    height, width = recipe.data.image_size
    with torch.device("meta"), _without_autocast():
        model = build_model(recipe.model.without_weights(), num_classes=classes, image_size=(height, width))
        model.train()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained)
        clip = (recipe.data.clip.frames,) if recipe.task == "video" else ()
        images = torch.zeros((1, 3, *clip, height, width))
        # The plain formula of attention: fused kernels compute its scores once more in the backward pass.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            loss_of = _detection_loss if recipe.task == "detection" else _loss
            loss_of(model, recipe, images).backward()  # type: ignore[no-untyped-call]
    return int(counter.get_total_flops())


@contextmanager
def _without_autocast() -> Iterator[None]:
    """Precision does not change the count, and torch's autocast refuses tensors without storage."""
    autocast = torch.autocast
    torch.autocast = lambda *_, **__: nullcontext()  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        torch.autocast = autocast  # type: ignore[misc]


def _loss(model: GraftedModel, recipe: Recipe, images: Tensor) -> Tensor:
    height, width = recipe.data.image_size
    shape = (1, height, width) if recipe.task == "semantic" else (1,)
    sizes = torch.zeros((1, 2))
    losses = model(images, sizes, torch.zeros(shape, dtype=torch.int64), torch.ones(1))
    return torch.stack([term.total for term in losses.values()]).sum()


def _detection_loss(model: GraftedModel, recipe: Recipe, images: Tensor) -> Tensor:
    """The parts of the detector that compute, without what chooses between boxes."""
    head, config = model.head, recipe.model.head
    assert isinstance(head, MaskRCNN)
    assert isinstance(config, MaskRCNNConfig)
    maps = model.adapter.maps(model.backbone, images)
    if model.neck is not None:
        maps = model.neck.maps(maps)
    levels = [maps[stride] for stride in head.strides]
    logits, deltas = head.rpn.head(levels)
    positive = round(config.roi_batch * config.roi_positive_fraction)
    linked = levels[0].sum() * 0  # RoIs have a gradient where the maps have one
    channels = levels[0].shape[1]
    outputs = [*logits, *deltas]
    outputs += head.box_predictor(head.box_head(linked + torch.zeros(config.roi_batch, channels, BOX_BINS, BOX_BINS)))
    if head.has_masks:
        regions = linked + torch.zeros(positive, channels, MASK_BINS, MASK_BINS)
        outputs.append(head.mask_predictor(head.mask_head(regions)))
    return torch.stack([output.sum() for output in outputs]).sum()
