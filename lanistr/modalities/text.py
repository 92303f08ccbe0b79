"""Text: BERT over packed tokens, masked language modelling at masked positions only.

Shape suffixes: T packed tokens (all views), M masked tokens, N rows, D width, V vocabulary, H heads, K head width.
"""

import contextlib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from lanistr.batch import Layout, make_layout
from lanistr.config import ModalityConfig
from lanistr.manifest import ModalitySchema
from lanistr.modalities.base import NO_ROWS, NO_WEIGHTS, Collated, Modality, ModalityEncoder, RawContext
from lanistr.modalities.loading import load_pretrained, published_sizes
from lanistr.ops.attention import attention
from lanistr.ops.masked_ce import linear_cross_entropy
from lanistr.transforms import MEMBERS, TextSpec, concatenate_npy, encode_text, read_npy

HF_ATTENTION = "lanistr_packed"
KEPT = -1  # in a corruption: this token is neither changed nor predicted


class TextConfig(ModalityConfig):
    """Size of BERT (defaults: bert-base) and masking.

    Attributes:
        pretrained: hub name or path of BERT weights; the sizes then come from there.
        max_tokens: longer texts are cut.
        mask_ratio: share of tokens predicted; special tokens never are.
        corruption: ``mask`` = every predicted token becomes [MASK] (paper, published code); ``bert`` = 80 % [MASK], 10 %
            a random token, 10 % unchanged (Devlin et al. 2019), so that visible tokens must keep their identity.
        fusion_tokens: ``all`` hidden states enter fusion (paper, section "Model architecture"), only ``cls``, the first
            one (published code, `modeling_lanistr.py`), or their ``mean`` (what sentence encoders are trained for).
        pooler: BERT's unused pooler, carried frozen by the ``official`` preset only.
        positions, norm_eps, activation: of BERT's architecture, for those that are not bert-base in them (an export of a
            run with ``pretrained`` writes them); ``positions`` None = ``max_tokens``.
    """

    pretrained: str | None = None
    hidden: int = 768
    layers: int = 12
    heads: int = 12
    intermediate: int = 3072
    max_tokens: int = Field(default=512, ge=3)
    mask_ratio: float = Field(default=0.15, gt=0, lt=1)
    corruption: Literal["mask", "bert"] = "mask"
    fusion_tokens: Literal["all", "cls", "mean"] = "all"
    pooler: bool = False
    positions: int | None = Field(default=None, ge=1)
    norm_eps: float = 1e-12
    activation: Literal["gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu"] = "gelu"


@dataclass(frozen=True)
class TextInput:
    """Packed token ids of all views, and the masked positions of the masked view.

    Attributes:
        ids_T, layout: sequences of view 0, then of view 1.
        first_S: packed position of each sequence's [CLS] where only these enter fusion, else None.
        sequence_T: sequence of each token where only the means of the sequences enter fusion, else None.
        masked_M: packed positions to predict; targets_M their original ids; weights_M the weight of their sample.
    """

    ids_T: Tensor
    layout: Layout
    first_S: Tensor | None
    sequence_T: Tensor | None
    masked_M: Tensor
    targets_M: Tensor
    weights_M: Tensor


class TextModality(Modality[np.ndarray, TextInput]):
    """Content: int64 token ids, [CLS] first, [SEP] last."""

    kind = "text"
    term = "mlm"
    Config = TextConfig

    def __init__(self, name: str, config: dict[str, Any], schema: ModalitySchema):
        super().__init__(name, config, schema)
        self.config = self.parse_config(TextConfig, config)
        self.spec = TextSpec.model_validate(schema.spec)
        self.is_special_V = np.zeros(self.spec.vocab_size, dtype=bool)
        self.is_special_V[[self.spec.cls_id, self.spec.sep_id, self.spec.pad_id]] = True

    def encode(self, record: Mapping[str, Any], context: RawContext) -> dict[str, bytes]:
        """A text, or several where the schema has several; a blank one is absent."""
        if record.get(self.name) is None:
            return {}
        if context.tokenizer is None:
            raise ValueError("the model came without its tokenizer")
        tokenizer = context.tokenizer

        def encode(text: str) -> dict[str, bytes]:
            stripped = text.strip(" ")
            return encode_text(stripped[: context.max_chars], tokenizer, self.spec) if stripped else {}

        return self.encode_items(record[self.name], (str,), encode)

    def portable(self) -> dict[str, Any]:
        """With the published sizes in the place of published weights."""
        if not self.config.pretrained:
            return self.block
        from transformers import BertConfig

        sizes = {
            "hidden": "hidden_size",
            "layers": "num_hidden_layers",
            "heads": "num_attention_heads",
            "intermediate": "intermediate_size",
            "positions": "max_position_embeddings",
            "norm_eps": "layer_norm_eps",
            "activation": "hidden_act",
        }
        found = published_sizes(BertConfig, self.config.pretrained, "text.pretrained", sizes)
        return {**self.block, "pretrained": None, **found}

    @classmethod
    def paper_schema(cls) -> ModalitySchema:
        """bert-base-uncased's vocabulary."""
        spec = TextSpec(vocab_size=30522, max_tokens=512, pad_id=0, unk_id=100, cls_id=101, sep_id=102, mask_id=103)
        return ModalitySchema(kind=cls.kind, members=MEMBERS[cls.kind], spec=spec.model_dump())

    def decode(self, members: Mapping[str, bytes]) -> np.ndarray:
        """Token ids, cut to ``max_tokens`` (the final [SEP] is kept)."""
        ids = read_npy(members["tok.npy"]).astype(np.int64)
        if ids.ndim != 1 or len(ids) < 2 or not 0 <= ids.min() <= ids.max() < self.spec.vocab_size:
            raise ValueError(f"tok.npy: shape {ids.shape}, largest id {ids.max(initial=-1)}: not token ids")
        return self._cut(ids)

    def decode_batch(
        self, members: Sequence[Mapping[str, bytes]], rngs: Iterable[np.random.Generator] | None = None
    ) -> list[np.ndarray | ValueError]:
        """As `Modality.decode_batch`; looks at each text alone only where something is wrong with one."""
        with contextlib.suppress(ValueError):
            ids_T, lengths = concatenate_npy([own["tok.npy"] for own in members])
            if min(lengths) >= 2 and 0 <= ids_T.min() <= ids_T.max() < self.spec.vocab_size:
                ids_T = ids_T.astype(np.int64)
                ends = itertools.accumulate(lengths)
                return [self._cut(ids_T[end - n : end]) for end, n in zip(ends, lengths, strict=True)]
        return super().decode_batch(members, rngs)

    def _cut(self, ids: np.ndarray) -> np.ndarray:
        if len(ids) <= self.config.max_tokens:
            return ids
        return np.append(ids[: self.config.max_tokens - 1], self.spec.sep_id)

    def tokens(self, lengths_N: np.ndarray) -> np.ndarray:
        """Cut to ``max_tokens``."""
        return np.minimum(lengths_N, self.config.max_tokens)

    def dummy(self) -> np.ndarray:
        """A single unknown token."""
        return np.array([self.spec.unk_id])

    def example(self) -> np.ndarray:
        """As many unknown tokens as fit between [CLS] and [SEP]."""
        length = min(self.config.max_tokens, self.spec.max_tokens)
        return np.array([self.spec.cls_id, *[self.spec.unk_id] * (length - 2), self.spec.sep_id])

    def corrupt(self, content: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """(T,) int64: what the masked view has in the place of each predicted token, `KEPT` elsewhere.

        A Bernoulli draw over tokens that are not special; at least one where there is one.
        """
        replaced = np.full(len(content), KEPT)
        maskable = np.flatnonzero(~self.is_special_V[content])
        if len(maskable):
            draws = rng.random(len(maskable))
            chosen = maskable[(draws < self.config.mask_ratio) | (draws == draws.min())]
            replaced[chosen] = self.spec.mask_id
            if self.config.corruption == "bert":
                kind = rng.random(len(chosen))
                replaced[chosen[kind < 0.2]] = content[chosen[kind < 0.2]]
                random = chosen[kind < 0.1]
                replaced[random] = rng.integers(self.spec.vocab_size, size=len(random))
        return replaced

    def collate(
        self, contents: Sequence[np.ndarray], masks: Sequence[np.ndarray] | None, weights: Sequence[float]
    ) -> Collated[TextInput]:
        """Pack the sequences, clean view first."""
        lengths = np.array([len(c) for c in contents])
        clean = np.concatenate(contents)
        layout = make_layout(lengths if masks is None else [*lengths, *lengths])
        enter = self.config.fusion_tokens
        tokens = lengths if enter == "all" else np.ones_like(lengths)
        first_S = layout.cu_seqlens[:-1].long() if enter == "cls" else None
        sequence_T = None
        if enter == "mean":
            sequences = np.arange(len(lengths) if masks is None else 2 * len(lengths))
            sequence_T = torch.from_numpy(sequences.repeat(layout.cu_seqlens.diff()))
        if masks is None:
            inputs = TextInput(torch.from_numpy(clean), layout, first_S, sequence_T, NO_ROWS, NO_ROWS, NO_WEIGHTS)
            return Collated(inputs, tokens, 0.0)
        replaced = np.concatenate(masks)
        positions = np.flatnonzero(replaced != KEPT)
        token_weights = np.repeat(np.asarray(weights, dtype=np.float32), lengths)[positions]
        if not len(positions):  # only empty texts: one position of weight 0 keeps the head in the graph
            positions, token_weights = np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.float32)
        inputs = TextInput(
            ids_T=torch.from_numpy(np.concatenate([clean, np.where(replaced == KEPT, clean, replaced)])),
            layout=layout,
            first_S=first_S,
            sequence_T=sequence_T,
            masked_M=torch.from_numpy(positions + len(clean)),
            targets_M=torch.from_numpy(clean[positions]),
            weights_M=torch.from_numpy(token_weights),
        )
        return Collated(inputs, tokens, float((token_weights > 0).sum()))

    def build(self, width: int, attention: str) -> "TextEncoder":
        """BERT, its projection and its MLM head."""
        return TextEncoder(self.config, self.spec, width, attention)


class MLMHead(nn.Module):
    """BERT's prediction head: dense, GELU, LayerNorm, untied decoder with bias."""

    def __init__(self, hidden: int, vocab_size: int, eps: float):
        super().__init__()
        self.dense = nn.Linear(hidden, hidden)
        self.norm = nn.LayerNorm(hidden, eps=eps)
        self.decoder = nn.Linear(hidden, vocab_size)
        nn.init.normal_(self.decoder.weight, std=0.02)
        nn.init.zeros_(self.decoder.bias)


class TextEncoder(ModalityEncoder[TextInput]):
    """BERT from transformers, packed through its attention interface."""

    def __init__(self, config: TextConfig, spec: TextSpec, width: int, backend: str):
        super().__init__()
        self.backend = backend
        self.pretrained = config.pretrained is not None
        self.encoder = _make_bert(config, spec)
        hidden = self.encoder.config.hidden_size
        self.projection = nn.Linear(hidden, width)
        self.head = MLMHead(hidden, spec.vocab_size, self.encoder.config.layer_norm_eps)

    def encode(self, inputs: TextInput) -> Tensor:
        """(T, hidden): one token per row."""
        output = self.encoder(
            input_ids=inputs.ids_T[None],
            position_ids=inputs.layout.positions_T[None],
            layout=inputs.layout,
            backend=self.backend,
        )
        return output.last_hidden_state[0]

    def entering(self, hidden: Tensor, inputs: TextInput) -> Tensor:
        """All tokens, or one per sequence."""
        if inputs.sequence_T is not None:
            lengths_S = inputs.layout.cu_seqlens.diff()
            sums_SH = hidden.new_zeros(len(lengths_S), hidden.shape[1]).index_add(0, inputs.sequence_T, hidden)
            return sums_SH / lengths_S[:, None]
        return hidden if inputs.first_S is None else hidden.index_select(0, inputs.first_S)

    def blocks(self) -> Iterable[nn.Module]:
        """BERT's layers."""
        return self.encoder.encoder.layer

    def checkpoint_activations(self) -> None:
        """Hugging Face's own checkpointing."""
        self.encoder.gradient_checkpointing_enable({"use_reentrant": False})

    def reconstruct(self, hidden: Tensor, inputs: TextInput) -> Tensor:
        """Cross-entropy summed over masked tokens (paper eq. 1: masked positions only)."""
        head = self.head
        hidden_MD = hidden.index_select(0, inputs.masked_M)
        hidden_MD = head.norm(nn.functional.gelu(head.dense(hidden_MD)))
        return linear_cross_entropy(
            hidden_MD, head.decoder.weight, head.decoder.bias, inputs.targets_M, inputs.weights_M
        )


def _make_bert(config: TextConfig, spec: TextSpec) -> Any:
    from transformers import BertConfig, BertModel

    _register_attention()
    no_dropout: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    if config.pretrained:
        bert = load_pretrained(
            BertModel,
            config.pretrained,
            "text.pretrained",
            add_pooling_layer=config.pooler,
            attn_implementation=HF_ATTENTION,
            **no_dropout,
        )
        if bert.config.vocab_size != spec.vocab_size:
            raise ValueError(
                f"text.pretrained {config.pretrained!r} has {bert.config.vocab_size} tokens, the dataset's tokenizer "
                f"{spec.vocab_size}; build the dataset with the model's tokenizer"
            )
    else:
        bert_config = BertConfig(
            vocab_size=spec.vocab_size,
            hidden_size=config.hidden,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            intermediate_size=config.intermediate,
            max_position_embeddings=config.positions or config.max_tokens,
            layer_norm_eps=config.norm_eps,
            hidden_act=config.activation,
            pad_token_id=spec.pad_id,
            **no_dropout,
        )
        bert_config._attn_implementation = HF_ATTENTION
        bert = BertModel(bert_config, add_pooling_layer=config.pooler)
    if bert.pooler is not None:
        bert.pooler.requires_grad_(False)
    return bert


def _register_attention() -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(HF_ATTENTION, _packed_attention)
    AttentionMaskInterface.register(HF_ATTENTION, _no_mask)


def _no_mask(*_: Any, **__: Any) -> None:
    """Packed sequences need no mask: the layout separates them."""


def _packed_attention(
    module: nn.Module,
    query_1HTK: Tensor,
    key_1HTK: Tensor,
    value_1HTK: Tensor,
    attention_mask: None,
    *,
    layout: Layout,
    backend: str,
    **_: Any,
) -> tuple[Tensor, None]:
    q_THK, k_THK, v_THK = (x[0].transpose(0, 1) for x in (query_1HTK, key_1HTK, value_1HTK))
    return attention(q_THK, k_THK, v_THK, layout, backend)[None], None
