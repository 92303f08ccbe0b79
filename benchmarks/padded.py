"""The pretraining step as it is usually written: dense, padded, masked, every modality for every sample.

Same parameters and same loss as `lanistr.tasks.Pretrain`; another way to the numbers. An absent modality is a placeholder
that is encoded, masked in attention and counted with weight 0; logits and reconstructions exist at all positions.

Shape suffixes: B samples, N = 2 * B rows (clean view, then masked), L padded length, P patches, C channels, D width,
V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu

from lanistr.batch import Batch, Layout
from lanistr.losses import simsiam_loss
from lanistr.modalities.image import ImageInput, _normalise, cut
from lanistr.modalities.text import TextInput
from lanistr.modalities.timeseries import SeriesInput
from lanistr.ops.transformer import Block, dense_block
from lanistr.tasks import Pretrain


@dataclass(frozen=True)
class Part:
    """Fusion tokens of one modality, (N, L, D), which of them are real, (N, L), and the total of its loss."""

    tokens_NLD: Tensor
    keep_NL: Tensor
    total: Tensor


def unpack(values_T: Tensor, layout: Layout, length: int) -> tuple[Tensor, Tensor]:
    """Packed rows as (S, length, ...), zeros where padded, and the (S, length) mask of what is real."""
    lengths_S = layout.cu_seqlens.diff()
    keep_SL = torch.arange(length) < lengths_S[:, None]
    padded = values_T.new_zeros(*keep_SL.shape, *values_T.shape[1:])
    padded[keep_SL] = values_T
    return padded, keep_SL


def padded_loss(task: Pretrain, batch: Batch, bert: nn.Module, longest: dict[str, int]) -> Callable[[], Tensor]:
    """A function that computes equation 3 for the batch.

    Args:
        task: holds the parameters.
        batch: ours; text and table or series in every sample, images in some.
        bert: Hugging Face's dense BERT with the task's parameters (`lanistr.modalities.padded.dense_bert`).
        longest: padded length of text and series.
    """
    prepared = {name: _PREPARE[name](task, batch, bert, longest) for name in batch.inputs}

    def loss() -> Tensor:
        parts = {name: run() for name, run in prepared.items()}
        totals = {task.term_of[name]: part.total for name, part in parts.items()}
        totals["mmm"] = _similarity(task, list(parts.values()))
        return torch.stack([task.weights[n] * t / max(batch.counts[n], 1) for n, t in totals.items()]).sum()

    return loss


def _text(task: Pretrain, batch: Batch, bert: nn.Module, longest: dict[str, int]) -> Callable[[], Part]:
    encoder: Any = task.model.encoder("text")
    inputs: TextInput = batch.inputs["text"]
    ids_NL, keep_NL = unpack(inputs.ids_T, inputs.layout, longest["text"])
    labels_T = torch.full_like(inputs.ids_T, -100)
    labels_T[inputs.masked_M] = inputs.targets_M
    labels_BL = unpack(labels_T + 100, inputs.layout, longest["text"])[0].chunk(2)[1] - 100

    def run() -> Part:
        hidden_NLD = bert(input_ids=ids_NL, attention_mask=keep_NL.long()).last_hidden_state
        y_BLD = encoder.head.norm(gelu(encoder.head.dense(hidden_NLD.chunk(2)[1])))
        logits_BLV = encoder.head.decoder(y_BLD).float()
        total = cross_entropy(logits_BLV.flatten(0, 1), labels_BL.flatten(), reduction="sum")
        if inputs.first_S is not None:
            return Part(encoder.projection(hidden_NLD[:, :1]), keep_NL[:, :1], total)
        return Part(encoder.projection(hidden_NLD), keep_NL, total)

    return run


def _image(task: Pretrain, batch: Batch, _: nn.Module, __: dict[str, int]) -> Callable[[], Part]:
    encoder: Any = task.model.encoder("image")
    bit = 1 << list(batch.inputs).index("image")
    present_B = (batch.presence_B & bit) > 0
    vit = encoder.encoder.config
    patches = (vit.image_size // vit.patch_size) ** 2
    inputs: ImageInput = batch.inputs["image"]
    pixels_BHWC = torch.zeros(batch.size, vit.image_size, vit.image_size, 3, dtype=torch.uint8)
    mask_BP1 = torch.zeros(batch.size, patches, 1, dtype=batch.weights_B.dtype)
    if present_B.any():
        assert inputs.mask_NP1 is not None
        pixels_BHWC[present_B], mask_BP1[present_B] = inputs.pixels_nHWC, inputs.mask_NP1.chunk(2)[1]
    both_NP1 = torch.cat([torch.zeros_like(mask_BP1), mask_BP1])
    nothing = torch.zeros(0, dtype=torch.int64)
    dense = ImageInput(pixels_BHWC, both_NP1, nothing, torch.zeros(0))
    keep_NL = present_B.repeat(2)[:, None].expand(-1, patches + 1)

    def run() -> Part:
        hidden_NLD = encoder.encode(dense).view(2 * batch.size, patches + 1, -1)
        out_BPX = encoder.head.decoder(hidden_NLD.chunk(2)[1][:, 1:]).float()
        error_BP = (out_BPX - _normalise(cut(pixels_BHWC, vit.patch_size), torch.float32)).abs().mean(-1)
        return Part(encoder.projection(hidden_NLD), keep_NL, (error_BP * mask_BP1[..., 0]).sum())

    return run


def _tabular(task: Pretrain, batch: Batch, _: nn.Module, __: dict[str, int]) -> Callable[[], Part]:
    encoder: Any = task.model.encoder("tabular")
    inputs = batch.inputs["tabular"]

    def run() -> Part:
        hidden = encoder.encode(inputs)
        tokens_NLD = encoder.projection(hidden).view(2 * batch.size, encoder.steps, -1)
        keep_NL = torch.ones(tokens_NLD.shape[:2], dtype=torch.bool)
        return Part(tokens_NLD, keep_NL, encoder.reconstruct(hidden, inputs))

    return run


def _series(task: Pretrain, batch: Batch, _: nn.Module, longest: dict[str, int]) -> Callable[[], Part]:
    encoder: Any = task.model.encoder("timeseries")
    inputs: SeriesInput = batch.inputs["timeseries"]
    length = longest["timeseries"]
    values_NLC, keep_NL = unpack(inputs.values_TC, inputs.layout, length)
    twice = torch.cat([inputs.targets_tC, inputs.targets_tC]), torch.cat([inputs.weights_tC, inputs.weights_tC])
    targets_BLC, weights_BLC = (unpack(x, inputs.layout, length)[0].chunk(2)[1] for x in twice)

    def run() -> Part:
        x_NLD = encoder.encoder.input(values_NLC) + encoder.encoder.positions[:length]
        for block in encoder.encoder.blocks:
            x_NLD = dense_block(block, x_NLD, keep_NL)
        error_BLC = encoder.head(x_NLD.chunk(2)[1]).float() - targets_BLC
        return Part(encoder.projection(x_NLD), keep_NL, (error_BLC.square() * weights_BLC).sum())

    return run


_PREPARE = {"text": _text, "image": _image, "tabular": _tabular, "timeseries": _series}


def _similarity(task: Pretrain, parts: list[Part]) -> Tensor:
    cls_ND = task.model.fusion.cls.expand(len(parts[0].tokens_NLD), 1, -1)
    x_NLD = torch.cat([cls_ND, *(part.tokens_NLD for part in parts)], dim=1)
    first = torch.ones(len(x_NLD), 1, dtype=torch.bool)
    keep_NL = torch.cat([first, *(part.keep_NL for part in parts)], dim=1)
    for block in task.model.fusion.blocks:
        assert isinstance(block, Block)
        x_NLD = dense_block(block, x_NLD, keep_NL)
    z, p = task.heads(task.model.fusion.norm(x_NLD))
    (z_clean, z_masked), (p_clean, p_masked) = z.chunk(2), p.chunk(2)
    loss_BL = simsiam_loss(*(t.flatten(0, 1) for t in (z_clean, p_clean, z_masked, p_masked)))
    keep_BL = keep_NL.chunk(2)[0]
    weight_BL = keep_BL / keep_BL.sum(1, keepdim=True)
    return (loss_BL.view_as(weight_BL) * weight_BL).sum()
