"""Mask R-CNN (arXiv 1703.06870) on an adapter's pyramid, from torchvision's parts, with losses as sums.

Ranks run their modules in lockstep, so every trainable parameter takes part in every training step: a batch without
targets sends an empty batch of RoIs through the heads, and its gradients are zero, not absent.

RoIs, boxes, suppression and losses are float32 without autocast; convolutions and linear layers follow the precision of
the maps. Sampling draws from torch's global generator.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler, BoxCoder, Matcher
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import paste_masks_in_image, project_masks_on_boxes
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops import boxes as box_ops

from vitgraft.configs.errors import ConfigError
from vitgraft.configs.schema.model import MaskRCNNConfig
from vitgraft.models.contract import Counts, DetectionPrediction, DetectionTarget, Losses, LossTerm
from vitgraft.models.heads.rpn import SMOOTH_L1_BETA, Level, RegionProposalNetwork, clip_boxes
from vitgraft.models.registry import register

BOX_BINS, MASK_BINS = 7, 14
FOREGROUND_IOU = 0.5
BOX_WEIGHTS = (10.0, 10.0, 5.0, 5.0)
SMALLEST_DETECTION = 1e-2
PASTE_BYTES = 1 << 26
"""Limit of the float32 canvas that :func:`paste_masks` fills at once."""


class Sampled(NamedTuple):
    """The RoIs of a training batch, all images together.

    ``boxes``: one (n, 4) per image. ``image``: (N,) whose. ``labels``: (N,) int64, 0 background, class + 1 otherwise.
    ``matched``: (N,) int64, the target's index in its image. ``shifts``: (N, 4) encoded boxes of the targets.
    """

    boxes: list[Tensor]
    image: Tensor
    labels: Tensor
    matched: Tensor
    shifts: Tensor


@register("head", "mask_rcnn")
class MaskRCNN(nn.Module):
    """Boxes, classes and masks from maps of one width and ascending strides.

    Raises ``ConfigError`` when the recipe has not one anchor size for each stride, or the maps are of several widths.
    """

    def __init__(self, config: MaskRCNNConfig, *, channels: dict[int, int], num_classes: int) -> None:
        super().__init__()
        self.strides = sorted(channels)
        # A fifth level (FPN's p6) proposes large boxes, but no features are taken from it (arXiv 1612.03144).
        self.roi_strides = self.strides[:4]
        width = channels[self.strides[0]]
        if len(set(channels.values())) > 1:
            raise ConfigError(
                f"model.head: mask_rcnn reads maps of one width, got channels by stride {channels}; add adapter fpn"
            )
        if len(config.anchor_sizes) != len(self.strides):
            raise ConfigError(
                f"model.head.anchor_sizes: {config.anchor_sizes} for the maps of strides {self.strides}; "
                "give one size for each stride"
            )
        self.rpn = RegionProposalNetwork(
            width,
            self.strides,
            config.anchor_sizes,
            config.anchor_ratios,
            config.rpn_batch,
            config.rpn_proposals,
        )
        self.box_head = TwoMLPHead(width * BOX_BINS**2, config.box_channels)
        self.box_predictor = FastRCNNPredictor(config.box_channels, num_classes + 1)
        nn.init.normal_(self.box_predictor.cls_score.weight, std=0.01)
        nn.init.normal_(self.box_predictor.bbox_pred.weight, std=0.001)
        self.has_masks = config.masks
        if self.has_masks:
            self.mask_head = MaskRCNNHeads(width, (config.mask_channels,) * config.mask_convs, 1)
            self.mask_predictor = MaskRCNNPredictor(config.mask_channels, config.mask_channels, num_classes)
        self.score_threshold = config.score_threshold
        self.nms_threshold = config.nms_threshold
        self.detections_per_image = config.detections_per_image
        self._box_align = self._align(BOX_BINS)
        self._mask_align = self._align(MASK_BINS)
        self._coder = BoxCoder(BOX_WEIGHTS)
        self._matcher = Matcher(FOREGROUND_IOU, FOREGROUND_IOU, allow_low_quality_matches=False)
        self._sampler = BalancedPositiveNegativeSampler(config.roi_batch, config.roi_positive_fraction)

    def forward(
        self,
        maps: dict[int, Tensor],
        sizes: Tensor,
        canvas: tuple[int, int],
        targets: list[DetectionTarget] | None = None,
        weights: Tensor | None = None,
    ) -> Losses | list[DetectionPrediction]:
        """Return losses, or detections without targets. maps: {stride: (B, C, H/stride, W/stride)}; sizes: (B, 2) valid
        height and width; canvas: (H, W).

        With targets, the losses ``rpn_objectness``, ``rpn_box``, ``box_class``, ``box_regression`` and ``mask`` with
        per-image weights (B,); without, the predictions of each image.
        """
        levels = [maps[stride] for stride in self.strides]
        if weights is None:
            weights = torch.ones(len(sizes), device=levels[0].device)
        losses: Losses
        proposals, losses = self.rpn(levels, sizes, targets, weights)
        if targets is None:
            return self._predict(levels, proposals, sizes)
        losses.update(self._losses(levels, self._sample(proposals, targets), targets, weights))
        return losses

    def counts(self, targets: list[DetectionTarget], weights: Tensor) -> Counts:
        """Return no counts: anchors and RoIs are sampled at random, and RoIs depend on the proposals."""
        return {}

    def recompute_units(self) -> list[nn.Module]:
        """Return the units of activation checkpointing: the box and the mask branch."""
        return [self.box_head, self.mask_head] if self.has_masks else [self.box_head]

    def _align(self, bins: int) -> MultiScaleRoIAlign:
        align = MultiScaleRoIAlign([str(stride) for stride in self.roi_strides], bins, sampling_ratio=2)
        # torchvision would infer powers of two from the first batch; the strides are known.
        align.scales = [1 / stride for stride in self.roi_strides]
        align.map_levels = Level(self.roi_strides)
        return align

    def _roi_features(self, align: MultiScaleRoIAlign, levels: list[Tensor], boxes: list[Tensor]) -> Tensor:
        with torch.autocast(levels[0].device.type, enabled=False):
            named = {str(stride): level.float() for stride, level in zip(self.roi_strides, levels, strict=False)}
            features: Tensor = align(named, boxes, [])
            return features.to(levels[0].dtype)

    def _boxes(self, levels: list[Tensor], boxes: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return class logits (N, K + 1) and box deltas (N, K + 1, 4), float32."""
        logits, shifts = self.box_predictor(self.box_head(self._roi_features(self._box_align, levels, boxes)))
        return logits.float(), shifts.float().unflatten(1, (-1, 4))

    def _masks(self, levels: list[Tensor], boxes: list[Tensor], classes: Tensor) -> Tensor:
        """Return mask logits of each RoI's class (N,) 0-based: (N, M, M) float32."""
        logits = self.mask_predictor(self.mask_head(self._roi_features(self._mask_align, levels, boxes)))
        return cast(Tensor, logits[torch.arange(len(logits), device=logits.device), classes].float())

    @torch.no_grad()
    def _sample(self, proposals: list[Tensor], targets: list[DetectionTarget]) -> Sampled:
        candidates, all_labels, all_matched = [], [], []
        for proposed, target in zip(proposals, targets, strict=True):
            truth = target["boxes"].to(proposed.dtype)
            boxes = torch.cat([proposed, truth])
            if len(truth) == 0:
                matched = torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device)
                labels = matched
            else:
                match = self._matcher(box_ops.box_iou(truth, boxes))
                matched = match.clamp(min=0)
                labels = (target["labels"][matched] + 1).masked_fill(match == Matcher.BELOW_LOW_THRESHOLD, 0)
            candidates.append(boxes)
            all_labels.append(labels)
            all_matched.append(matched)
        positive, negative = self._sampler(all_labels)
        chosen = [torch.where(p | n)[0] for p, n in zip(positive, negative, strict=True)]
        boxes_of = [boxes[index] for boxes, index in zip(candidates, chosen, strict=True)]
        matched_of = [matched[index] for matched, index in zip(all_matched, chosen, strict=True)]
        truths = [
            target["boxes"].float()[matched] if len(target["boxes"]) else boxes
            for target, matched, boxes in zip(targets, matched_of, boxes_of, strict=True)
        ]
        image = [torch.full_like(index, number) for number, index in enumerate(chosen)]
        return Sampled(
            boxes_of,
            torch.cat(image),
            torch.cat([labels[index] for labels, index in zip(all_labels, chosen, strict=True)]),
            torch.cat(matched_of),
            self._coder.encode_single(torch.cat(truths), torch.cat(boxes_of)),
        )

    def _losses(
        self, levels: list[Tensor], sampled: Sampled, targets: list[DetectionTarget], weights: Tensor
    ) -> Losses:
        logits, shifts = self._boxes(levels, sampled.boxes)
        with torch.autocast(logits.device.type, enabled=False):
            weight = weights[sampled.image]
            count = weight.sum()
            wrong = F.cross_entropy(logits, sampled.labels, reduction="none")
            positive = torch.where(sampled.labels > 0)[0]
            error = F.smooth_l1_loss(
                shifts[positive, sampled.labels[positive]],
                sampled.shifts[positive],
                beta=SMOOTH_L1_BETA,
                reduction="none",
            ).sum(1)
            losses = {
                "box_class": LossTerm((wrong * weight).sum(), count),
                "box_regression": LossTerm((error * weight[positive]).sum(), count),
            }
        if self.has_masks:
            losses["mask"] = self._mask_loss(levels, sampled, targets, weights)
        return losses

    def _mask_loss(
        self, levels: list[Tensor], sampled: Sampled, targets: list[DetectionTarget], weights: Tensor
    ) -> LossTerm:
        """Return the binary cross-entropy of the target's class, averaged over a RoI's pixels, summed over positive
        RoIs."""
        positive = sampled.labels > 0
        boxes, wanted, start = [], [], 0
        for number, image_boxes in enumerate(sampled.boxes):
            mine = positive[start : start + len(image_boxes)]
            matched = sampled.matched[start : start + len(image_boxes)][mine]
            boxes.append(image_boxes[mine])
            wanted.append(_mask_targets(targets[number]["masks"], boxes[-1], matched))
            start += len(image_boxes)
        logits = self._masks(levels, boxes, sampled.labels[positive] - 1)
        with torch.autocast(logits.device.type, enabled=False):
            error = F.binary_cross_entropy_with_logits(logits, torch.cat(wanted), reduction="none")
            weight = weights[sampled.image[positive]]
            return LossTerm((error.flatten(1).mean(1) * weight).sum(), weight.sum())

    def _predict(self, levels: list[Tensor], proposals: list[Tensor], sizes: Tensor) -> list[DetectionPrediction]:
        logits, shifts = self._boxes(levels, proposals)
        with torch.autocast(logits.device.type, enabled=False):
            scores = logits.softmax(1)[:, 1:]
            boxes = self._coder.decode_single(shifts[:, 1:].flatten(1), torch.cat(proposals))
            counts = [len(image) for image in proposals]
            predictions = [
                self._detections(image_boxes, image_scores, size)
                for image_boxes, image_scores, size in zip(
                    torch.split(boxes, counts), torch.split(scores, counts), sizes, strict=True
                )
            ]
        if self.has_masks:
            found = [prediction["boxes"] for prediction in predictions]
            classes = torch.cat([prediction["labels"] for prediction in predictions])
            masks = self._masks(levels, found, classes).sigmoid()
            for prediction, image_masks in zip(predictions, torch.split(masks, [len(b) for b in found]), strict=True):
                prediction["masks"] = image_masks
        return predictions

    def _detections(self, boxes: Tensor, scores: Tensor, size: Tensor) -> DetectionPrediction:
        """Return an image's detections by descending score, from boxes (P, K, 4) and scores (P, K) of every class."""
        boxes = clip_boxes(boxes.reshape(1, -1, 4), size[None])[0]
        big = ((boxes[:, 2:] - boxes[:, :2]) >= SMALLEST_DETECTION).all(1)
        index = torch.where(big & (scores.flatten() > self.score_threshold))[0]
        boxes, labels, scores = boxes[index], index % max(1, scores.shape[1]), scores.flatten()[index]
        kept = box_ops.batched_nms(boxes, scores, labels, self.nms_threshold)[: self.detections_per_image]
        return cast(DetectionPrediction, {"boxes": boxes[kept], "labels": labels[kept], "scores": scores[kept]})


def paste_masks(masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Paste mask probabilities (n, M, M) of boxes (n, 4) xyxy into an image: (n, height, width) uint8.

    1 where the probability exceeds one half. Works on so many masks at a time that memory stays bounded.
    """
    height, width = size
    pasted = torch.zeros((len(masks), height, width), dtype=torch.uint8, device=masks.device)
    step = max(1, PASTE_BYTES // (4 * height * width))
    for start in range(0, len(masks), step):
        part = slice(start, start + step)
        soft = paste_masks_in_image(masks[part, None].float(), boxes[part].float(), size)
        pasted[part] = soft[:, 0] > 0.5
    return pasted


def _mask_targets(masks: Tensor, boxes: Tensor, matched: Tensor) -> Tensor:
    """Crop and resize the targets' masks (N, H, W) to RoIs (n, 4), matched (n,): (n, M, M) float32 in 0..1."""
    bins = 2 * MASK_BINS
    if len(boxes) == 0:
        return boxes.new_zeros((0, bins, bins))
    # Only the masks that a RoI is matched with become float32.
    used, place = torch.unique(matched, return_inverse=True)
    projected: Tensor = project_masks_on_boxes(masks[used].float(), boxes, place, bins)
    return projected
