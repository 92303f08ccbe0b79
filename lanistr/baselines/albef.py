"""ALBEF (Li et al. 2021) with the recipe's encoders: align image and text before they are fused.

Image-text contrast against momentum encoders and a queue, image-text matching with hard negatives, masked language
modelling on the fused tokens with the momentum model as a teacher. A text encoder that is frozen has no masked text, and
no such term. The recipe's BERT and ViT are the unimodal encoders
and LANISTR's fusion encoder is the multimodal one: it attends over [CLS], text and image together, where the published
one has cross-attention; after fine-tuning its [CLS], or the mean of its tokens, is classified.

Shape suffixes: S texts, n images, P pairs, T packed tokens, D fusion width, H hidden width of an encoder, E embedding
width, M masked tokens, F fused rows.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, normalize

from lanistr.baselines.albef_losses import Queue, contrastive_losses, distilled_losses, follow, hard_negatives
from lanistr.batch import Batch, Layout, make_layout
from lanistr.config import ModelConfig
from lanistr.data.loader import Collator
from lanistr.data.samples import Sample
from lanistr.modalities.base import Modality, ModalityEncoder
from lanistr.modalities.encoded import Encoded
from lanistr.modalities.image import ImageInput
from lanistr.modalities.text import MLMHead, TextInput
from lanistr.model.lanistr import Lanistr
from lanistr.ops.attention import resolve_backend
from lanistr.tasks import freeze_parts


@dataclass(frozen=True)
class AlbefConfig:
    """As published, but for the queue, which holds at most half of the pairs: a sample never meets its older self.

    Attributes:
        embed: width of the embeddings that are contrasted.
        queue: entries at most.
        momentum: of the slow encoders.
        temperature: at the start; it is learnt, between 0.001 and 0.5.
        alpha: weight of distillation, after a linear rise in the first epoch.
    """

    embed: int = 256
    queue: int = 65536
    momentum: float = 0.995
    temperature: float = 0.07
    alpha: float = 0.4


class Branch(nn.Module):
    """What exists twice: with gradient, and as its slow follower."""

    def __init__(self, model: Lanistr, text: str, image: str, embed: int, mlm: nn.Module):
        super().__init__()
        self.model, self.names = model, (text, image)
        hidden = [model.encoder(name).projection.in_features for name in self.names]
        self.text_embed, self.image_embed = (nn.Linear(cast(int, size), embed) for size in hidden)
        self.mlm = mlm


class Seen(NamedTuple):
    """A branch's view of a batch.

    Attributes:
        pool_TD: fusion's [CLS], then the tokens of all texts (clean, then masked if any) and of all images.
        text_SE, image_nE: unit embeddings of each clean text and each image.
    """

    pool_TD: Tensor
    text_SE: Tensor
    image_nE: Tensor


class Places(NamedTuple):
    """Where things lie in `Seen.pool_TD`: (first, last + 1) of each sequence."""

    clean_S: np.ndarray
    masked_S: np.ndarray
    images_n: np.ndarray


class AlbefPretrain(nn.Module):
    """The three objectives over a batch of texts, of which some have an image.

    A text without an image is part of masked language modelling only; where the text's encoder is frozen there is none.

    Args:
        config: of the model.
        modalities: a text and an image.
        albef: what is ALBEF's own.
        pairs: image-text pairs in the data.
        ramp: steps until distillation has its full weight.
        device: kind of device that it will run on.
        frozen: modalities whose encoders stay as they are.
    """

    def __init__(
        self,
        config: ModelConfig,
        modalities: Mapping[str, Modality[Any, Any]],
        albef: AlbefConfig,
        pairs: int,
        ramp: int,
        bits: Mapping[str, int],
        device: str,
        frozen: Sequence[str] = (),
    ):
        super().__init__()
        self.albef, self.ramp, self.bits, self.steps = albef, ramp, dict(bits), 0
        kinds = {modality.kind: name for name, modality in modalities.items()}
        self.text, self.image = kinds["text"], kinds["image"]
        model = Lanistr(config, dict(modalities), resolve_backend(config.attention, device))
        vocab_size = cast(Any, modalities[self.text]).spec.vocab_size
        width, eps = config.fusion.width, config.fusion.norm_eps
        self.masked = self.text not in frozen
        self.weights = {"itc": 1.0, "itm": 1.0} | ({"mlm": 1.0} if self.masked else {})
        mlm = MLMHead(width, vocab_size, eps) if self.masked else nn.Identity()
        self.fast = Branch(model, self.text, self.image, albef.embed, mlm)
        model.drop_heads()
        self.frozen = freeze_parts(model, frozen)
        self.slow = copy.deepcopy(self.fast).requires_grad_(False)
        self.match = nn.Linear(width, 2)
        self.temperature = nn.Parameter(torch.tensor(albef.temperature))
        self.queue = Queue(max(1, min(albef.queue, pairs // 2)), albef.embed)

    @property
    def model(self) -> Lanistr:
        """What fine-tuning starts from."""
        return self.fast.model

    def train(self, mode: bool = True) -> "AlbefPretrain":
        """As `nn.Module.train`, but frozen encoders stay in eval mode."""
        super().train(mode)
        for module in self.frozen:
            module.eval()
        return self

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Totals of the terms; see `PairCollator` for what they are divided by."""
        alpha = self.albef.alpha * min(1.0, self.steps / max(1, self.ramp))
        with torch.no_grad():
            self.temperature.clamp_(0.001, 0.5)
            if self.training:
                follow(self.slow, self.fast, self.albef.momentum)
                self.steps += 1
            places = self._places(batch)
            slow = self._look(self.slow, batch, places)
        fast = self._look(self.fast, batch, places)
        text_of, image_of = paired_rows(batch.presence_B, self.bits[self.text], self.bits[self.image])
        image_of_text = dict(zip(text_of, image_of, strict=True))
        totals: dict[str, Tensor] = {name: fast.pool_TD.new_zeros(()) for name in ("itc", "itm")}
        if self.masked:
            totals["mlm"] = self._masked(fast, slow, places, image_of_text, batch.inputs[self.text], alpha)
        if text_of:
            text_PE, image_PE = fast.text_SE[text_of], fast.image_nE[image_of]
            slow_text_PE, slow_image_PE = slow.text_SE[text_of], slow.image_nE[image_of]
            queues = (self.queue.image_QE.clone(), self.queue.text_QE.clone())
            losses_P = contrastive_losses(
                image_PE, text_PE, slow_image_PE, slow_text_PE, *queues, self.temperature, alpha
            )
            totals["itc"] = losses_P.sum()
            if self.training:
                self.queue.push(slow_image_PE, slow_text_PE)
            if len(text_of) > 1:
                images_P = hard_negatives(text_PE, slow_image_PE, self.temperature).tolist()
                texts_P = hard_negatives(image_PE, slow_text_PE, self.temperature).tolist()
                totals["itm"] = self._matched(fast, places, text_of, image_of, images_P, texts_P)
        return totals

    def _look(self, branch: Branch, batch: Batch, places: Places) -> Seen:
        texts, images = batch.inputs[self.text], batch.inputs[self.image]
        if isinstance(images, ImageInput):
            images = replace(images, mask_NP1=None)  # images are never masked
        text_TH, text_TD = _encode(branch.model.encoder(self.text), texts)
        image_TH, image_TD = _encode(branch.model.encoder(self.image), images)
        text_S, image_n = (
            torch.from_numpy(spans[:, 0] - start).to(text_TH.device)
            for spans, start in ((places.clean_S, 1), (places.images_n, 1 + len(text_TH)))
        )
        text_SE = normalize(branch.text_embed(text_TH.index_select(0, text_S)), dim=1)
        image_nE = normalize(branch.image_embed(image_TH.index_select(0, image_n)), dim=1)
        return Seen(torch.cat([branch.model.fusion.cls, text_TD, image_TD]), text_SE, image_nE)

    def _places(self, batch: Batch) -> Places:
        slots = np.bincount(batch.fusion.slot_T.cpu().numpy(), minlength=3 * batch.size).reshape(-1, 3)
        of = {name: slots[:, 1 + i] for i, name in enumerate(self.model.encoders)}
        text_S, image_n = (of[name][of[name] > 0] for name in (self.text, self.image))
        clean_S = _spans(1, text_S)  # row 0 of the pool is [CLS]
        tokens = text_S.sum()
        return Places(clean_S, clean_S + tokens, _spans(1 + batch.views * tokens, image_n))

    def _masked(
        self,
        fast: Seen,
        slow: Seen,
        places: Places,
        image_of_text: Mapping[int, int],
        texts: TextInput,
        alpha: float,
    ) -> Tensor:
        """Masked tokens, predicted from the masked text and its image, where it has one."""
        spans = [
            [text, *([places.images_n[image_of_text[i]]] if i in image_of_text else [])]
            for i, text in enumerate(places.masked_S)
        ]
        gather_F, layout = join(spans, texts.ids_T.device)
        row_of = torch.zeros(len(fast.pool_TD), dtype=torch.int64, device=gather_F.device)
        row_of[gather_F] = torch.arange(len(gather_F), device=gather_F.device)
        masked_M = row_of[texts.masked_M + 1]  # of the [CLS] row's any, but no text token stands twice
        logits_MV = _logits(self.fast, self._fuse(self.fast, fast, gather_F, layout)[masked_M])
        with torch.no_grad():
            slow_MV = _logits(self.slow, self._fuse(self.slow, slow, gather_F, layout)[masked_M])
        return (distilled_losses(logits_MV, slow_MV, texts.targets_M, alpha) * texts.weights_M).sum()

    def _matched(
        self,
        fast: Seen,
        places: Places,
        text_of: Sequence[int],
        image_of: Sequence[int],
        negative_image_P: Sequence[int],
        negative_text_P: Sequence[int],
    ) -> Tensor:
        """Cross-entropy over each pair, each text with another image, and each image with another text."""
        combined = [
            *zip(text_of, image_of, strict=True),
            *((text, image_of[p]) for text, p in zip(text_of, negative_image_P, strict=True)),
            *((text_of[p], image) for image, p in zip(image_of, negative_text_P, strict=True)),
        ]
        spans = [[places.clean_S[text], places.images_n[image]] for text, image in combined]
        gather_F, layout = join(spans, fast.pool_TD.device)
        fused_FD = self._fuse(self.fast, fast, gather_F, layout)
        logits = self.match(fused_FD.index_select(0, layout.cu_seqlens[:-1].long()))
        truth = (torch.arange(len(combined), device=logits.device) < len(text_of)).long()
        return cross_entropy(logits, truth, reduction="sum")

    def _fuse(self, branch: Branch, seen: Seen, gather_F: Tensor, layout: Layout) -> Tensor:
        x_FD = seen.pool_TD.index_select(0, gather_F)
        for block in branch.model.fusion.blocks:
            x_FD = block(x_FD, layout)
        return branch.model.fusion.norm(x_FD)


def _encode(encoder: ModalityEncoder[Any], inputs: Any) -> tuple[Tensor, Tensor]:
    """Hidden states of all tokens, and the same as fusion takes them; of a frozen encoder they may be there already."""
    if isinstance(inputs, Encoded):
        return inputs.rows_RH, encoder.projection(inputs.rows_RH)
    hidden = encoder.encode(inputs)
    return hidden, encoder.project(hidden, inputs)


def _spans(start: int, lengths: np.ndarray) -> np.ndarray:
    """(first, last + 1) of rows that follow each other."""
    ends = start + np.cumsum(lengths, dtype=np.int64)
    return np.stack([ends - lengths, ends], axis=1)


def _logits(branch: Branch, fused_MD: Tensor) -> Tensor:
    head = cast(MLMHead, branch.mlm)
    return head.decoder(head.norm(gelu(head.dense(fused_MD))))


def paired_rows(presence_B: Tensor, text_bit: int, image_bit: int) -> tuple[list[int], list[int]]:
    """Of each sample that has both: which text of the batch, and which image of it, it is."""
    has_text, has_image = ((presence_B.cpu().numpy() & bit) > 0 for bit in (text_bit, image_bit))
    both = has_text & has_image
    return (has_text.cumsum() - 1)[both].tolist(), (has_image.cumsum() - 1)[both].tolist()


def join(spans: Sequence[Sequence[np.ndarray]], device: torch.device) -> tuple[Tensor, Layout]:
    """Fusion sequences of [CLS] (row 0 of a pool) and spans of the pool: rows of the pool, and the layout."""
    rows = [np.concatenate([[0], *(np.arange(first, stop) for first, stop in own)]) for own in spans]
    layout = make_layout([len(own) for own in rows])
    tensors = {name: value.to(device) for name, value in vars(layout).items() if isinstance(value, Tensor)}
    return torch.from_numpy(np.concatenate(rows)).to(device), replace(layout, **tensors)


@dataclass(frozen=True, kw_only=True)
class PairCollator(Collator):
    """A `Collator` that also counts pairs, and the combinations that matching classifies.

    Attributes:
        text, image: names of the modalities.
    """

    text: str
    image: str

    def __call__(self, samples: Sequence[Sample], weights: Sequence[float], epoch: int) -> Batch:
        """See `Collator`."""
        batch = super().__call__(samples, weights, epoch)
        pairs = sum(self.text in sample.contents and self.image in sample.contents for sample in samples)
        return replace(batch, counts={**batch.counts, "itc": float(pairs), "itm": 3.0 * pairs if pairs > 1 else 0.0})
