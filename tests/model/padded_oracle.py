"""The pretraining step as a textbook would write it: padded, masked, sample by sample. Slow and independent.

It shares the model's *parameters* and nothing else of its forward pass, but for TabNet (checked against upstream in
tests/modalities/test_tabular.py): BERT and ViT run through Hugging Face's own forward on padded batches, the series
encoder and the fusion encoder are naive dense attention with a key mask, and the losses are loops.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import BertModel

from lanistr.modalities.base import Modality
from lanistr.tasks import Pretrain


def dense_block(block: Any, x: Tensor, keep: Tensor) -> Tensor:
    """One transformer layer over (B, L, D) with a (B, L) key mask, softmax by hand."""

    def attend(y: Tensor) -> Tensor:
        batch, length, width = y.shape
        q, k, v = block.qkv(y).chunk(3, dim=-1)
        split = lambda t: t.view(batch, length, block.heads, -1).transpose(1, 2)  # noqa: E731
        scores = split(q) @ split(k).transpose(-1, -2) / math.sqrt(width // block.heads)
        scores = scores.masked_fill(~keep[:, None, None, :], -1e30)
        return block.out((scores.softmax(-1) @ split(v)).transpose(1, 2).reshape(batch, length, width))

    def mlp(y: Tensor) -> Tensor:
        return block.down(nn.functional.gelu(block.up(y)))

    if block.pre_norm:
        x = x + attend(block.norm1(x))
        return x + mlp(block.norm2(x))
    x = block.norm1(x + attend(x))
    return block.norm2(x + mlp(x))


def pad(arrays: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    longest = max(len(a) for a in arrays)
    out = np.zeros((len(arrays), longest, *arrays[0].shape[1:]), dtype=arrays[0].dtype)
    keep = np.zeros((len(arrays), longest), dtype=bool)
    for i, a in enumerate(arrays):
        out[i, : len(a)], keep[i, : len(a)] = a, True
    return out, keep


def text_hidden(encoder: Any, sequences: Sequence[np.ndarray]) -> list[Tensor]:
    ids, keep = pad(sequences)
    config = type(encoder.encoder.config).from_dict(encoder.encoder.config.to_dict())
    config._attn_implementation = "eager"
    bert = BertModel(config, add_pooling_layer=False)
    output = torch.func.functional_call(
        bert,
        dict(encoder.encoder.named_parameters()),
        (),
        {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(keep).long()},
    )
    return [h[: len(s)] for h, s in zip(output.last_hidden_state, sequences, strict=True)]


def image_hidden(encoder: Any, pixels: Tensor, masks: Tensor) -> list[Tensor]:
    """Pixels (N, H, W, C) uint8, through Hugging Face's own patch embedding."""
    pictures = pixels.permute(0, 3, 1, 2).to(encoder.projection.weight.dtype) / 127.5 - 1
    embeddings = encoder.encoder.embeddings
    x = embeddings.patch_embeddings(pictures)
    x = torch.where(masks[..., None], encoder.head.mask_token, x)
    x = torch.cat([embeddings.cls_token.expand(len(x), -1, -1), x], 1) + embeddings.position_embeddings
    for layer in encoder.encoder.layers:
        x = layer(x)
    return list(encoder.encoder.layernorm(x))


def series_hidden(encoder: Any, values: Sequence[np.ndarray]) -> list[Tensor]:
    dense, keep = pad(values)
    x = (
        encoder.encoder.input(torch.from_numpy(dense).to(encoder.projection.weight.dtype))
        + encoder.encoder.positions[: dense.shape[1]]
    )
    for block in encoder.encoder.blocks:
        x = dense_block(block, x, torch.from_numpy(keep))
    return [h[: len(v)] for h, v in zip(x, values, strict=True)]


def oracle_terms(
    task: Pretrain,
    modalities: Mapping[str, Modality[Any, Any]],
    contents: Sequence[Mapping[str, Any]],
    masks: Sequence[Mapping[str, np.ndarray]],
) -> dict[str, Tensor]:
    """Mean of every term; a term of which nothing is present is zero."""
    size = len(contents)
    tokens: list[list[list[Tensor]]] = [[[], []] for _ in range(size)]
    terms: dict[str, Tensor] = {}
    for name in modalities:
        rows = [i for i in range(size) if name in contents[i]]
        if not rows:
            terms[modalities[name].term] = torch.zeros(())
            continue
        run = {"text": _text, "image": _image, "tabular": _tabular, "timeseries": _series}[name]
        hidden, terms[modalities[name].term] = run(
            task.model.encoder(name),
            modalities[name],
            [contents[i][name] for i in rows],
            [masks[i][name] for i in rows],
        )
        for view in range(2):
            for row, h in zip(rows, hidden[view], strict=True):
                config = getattr(modalities[name], "config")  # noqa: B009
                enters = h[:1] if getattr(config, "fusion_tokens", "all") == "cls" else h
                tokens[row][view].append(task.model.encoder(name).projection(enters))
    for name, token in task.model.absent.items():
        for row in (i for i in range(size) if name not in contents[i]):
            for view in range(2):
                tokens[row][view].append(token)
    terms["mmm"] = _similarity(task, tokens)
    return terms


def _text(encoder: Any, _: Any, contents: Any, masks: Any) -> Any:
    corrupted = [np.where(m >= 0, m, c) for c, m in zip(contents, masks, strict=True)]
    clean, masked = text_hidden(encoder, contents), text_hidden(encoder, corrupted)
    losses = []
    for h, c, m in zip(masked, contents, masks, strict=True):
        for position in np.flatnonzero(m >= 0):
            y = encoder.head.norm(nn.functional.gelu(encoder.head.dense(h[position])))
            losses.append(-encoder.head.decoder(y).log_softmax(-1)[c[position]])
    return (clean, masked), torch.stack(losses).mean()


def _image(encoder: Any, _: Any, contents: Any, masks: Any) -> Any:
    pixels, mask = torch.from_numpy(np.stack(contents)), torch.from_numpy(np.stack(masks))
    clean = image_hidden(encoder, pixels, torch.zeros_like(mask))
    masked = image_hidden(encoder, pixels, mask)
    patch = encoder.encoder.config.patch_size
    losses = []
    for h, p, m in zip(masked, pixels, mask, strict=True):
        for position in m.nonzero()[:, 0].tolist():
            row, column = divmod(position, p.shape[1] // patch)
            square = p[row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
            target = square.permute(2, 0, 1).flatten().float() / 127.5 - 1
            losses.append((encoder.head.decoder(h[position + 1]) - target).abs().mean())
    return (clean, masked), torch.stack(losses).mean()


def _series(encoder: Any, _: Any, contents: Any, masks: Any) -> Any:
    corrupted = [np.where(m, np.float32(0), c.values_tC) for c, m in zip(contents, masks, strict=True)]
    clean, masked = series_hidden(encoder, [c.values_tC for c in contents]), series_hidden(encoder, corrupted)
    losses = []
    for h, c, m in zip(masked, contents, masks, strict=True):
        predicted = encoder.head(h)
        for step, channel in np.argwhere(m & c.observed_tC):
            losses.append((predicted[step, channel] - float(c.values_tC[step, channel])) ** 2)
    return (clean, masked), torch.stack(losses).mean()


def _tabular(encoder: Any, modality: Any, contents: Any, masks: Any) -> Any:
    clean, masked, losses, count = [], [], [], 0.0
    for content, mask in zip(contents, masks, strict=True):  # one row at a time: running statistics only
        collated = modality.collate([content], [mask], [1.0])
        hidden = encoder.encode(collated.inputs)
        steps = int(collated.token_counts[0])
        clean.append(hidden[:steps])
        masked.append(hidden[steps:])
        losses.append(encoder.reconstruct(hidden, collated.inputs))
        count += collated.count
    return (clean, masked), torch.stack(losses).sum() / max(count, 1)


def _similarity(task: Pretrain, tokens: list[list[list[Tensor]]]) -> Tensor:
    views = []
    for view in range(2):
        sequences = [torch.cat([task.model.fusion.cls, *t[view]]) for t in tokens]
        x = nn.utils.rnn.pad_sequence(sequences, batch_first=True)
        keep = torch.arange(x.shape[1]) < torch.tensor([len(s) for s in sequences])[:, None]
        for block in task.model.fusion.blocks:
            x = dense_block(block, x, keep)
        views.append([h[: len(s)] for h, s in zip(task.model.fusion.norm(x), sequences, strict=True)])
    losses = []
    for h1, h2 in zip(*views, strict=True):
        if task.similarity == "cls":
            h1, h2 = h1[:1], h2[:1]
        z1, z2 = task.heads.projector(h1), task.heads.projector(h2)
        p1, p2 = task.heads.predictor(z1), task.heads.predictor(z2)
        cosine = nn.functional.cosine_similarity
        losses.append((-cosine(p1, z2.detach(), dim=-1) - cosine(p2, z1.detach(), dim=-1)).mean() / 2)
    return torch.stack(losses).mean()
