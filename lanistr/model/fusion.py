"""The multimodal encoder and the SimSiam heads.

Shape suffixes: T packed fusion rows, D width, S sequences.
"""

import itertools
from typing import Any, cast

import torch
from torch import Tensor, nn

from lanistr.batch import FusionIndex
from lanistr.config import FusionConfig
from lanistr.modalities.loading import load_pretrained
from lanistr.ops.transformer import Block


class FusionEncoder(nn.Module):
    """[CLS] and the tokens of all present modalities through pre-norm layers (paper section 3.2; FLAVA's encoder).

    An absent modality has no tokens: nothing attends to a placeholder.
    """

    def __init__(self, config: FusionConfig, backend: str):
        super().__init__()
        width = config.width
        # FLAVA's starts at zero. Of a sample that has nothing else, each layer norm would then see a constant row, and
        # multiply its gradient by 1 / sqrt(norm_eps): infinite after three layers.
        self.cls = nn.Parameter(config.init_std * torch.randn(1, width))
        self.blocks = nn.ModuleList(
            Block(
                width,
                config.heads,
                config.intermediate,
                config.norm_eps,
                backend,
                pre_norm=True,
                init_std=config.init_std,
            )
            for _ in range(config.layers)
        )
        if config.zero_init:
            for name, parameter in self.blocks.named_parameters():
                if name.endswith(("out.weight", "down.weight")):
                    nn.init.zeros_(parameter)
        self.norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.pooler = nn.Linear(width, width).requires_grad_(False) if config.pooler else None
        if config.pretrained:
            self._load_flava(config.pretrained)

    @torch.no_grad()
    def _load_flava(self, source: str) -> None:
        """Start from FLAVA's multimodal encoder, as the published code does."""
        from transformers import FlavaMultimodalModel

        flava: Any = load_pretrained(FlavaMultimodalModel, source, "fusion.pretrained", add_pooling_layer=False)
        theirs, ours = flava.config, self.blocks[0]
        sizes = {
            "width": (theirs.hidden_size, self.cls.shape[1]),
            "layers": (theirs.num_hidden_layers, len(self.blocks)),
            "heads": (theirs.num_attention_heads, cast(Block, ours).heads),
            "intermediate": (theirs.intermediate_size, cast(Block, ours).up.out_features),
        }
        for key, (there, here) in sizes.items():
            if there != here:
                raise ValueError(f"fusion.pretrained {source!r} has {key} {there}; the recipe says {key} {here}")
        self.cls.copy_(flava.cls_token[0])
        self.norm.load_state_dict(flava.layernorm.state_dict())
        for block, layer in zip(self.blocks, flava.encoder.layer, strict=True):
            _copy_layer(cast(Block, block), layer)

    def assemble(self, pools: list[Tensor], index: FusionIndex) -> Tensor:
        """Put [CLS] and the tokens of each sample's present modalities one after the other.

        Args:
            pools: tokens of each modality, (rows of all views, D), in the order that ``index`` was made for; then the
                learnt tokens of absent modalities.
            index: of the batch.

        Returns:
            (T, D) of all views.
        """
        return torch.cat([self.cls.to(pools[0].dtype), *pools]).index_select(0, index.gather_T)

    def forward(self, x_TD: Tensor, index: FusionIndex) -> Tensor:
        """Encode what `assemble` made; (T, D) of all views."""
        for block in self.blocks:
            x_TD = block(x_TD, index.layout)
        return self.norm(x_TD)


def _copy_layer(block: Block, layer: Any) -> None:
    """One layer of FLAVA into one of ours; query, key and value become one matrix."""
    inner = layer.attention.attention
    parts = (inner.query, inner.key, inner.value)
    block.qkv.weight.copy_(torch.cat([p.weight for p in parts]))
    block.qkv.bias.copy_(torch.cat([p.bias for p in parts]))
    for mine, theirs in (
        (block.out, layer.attention.output.dense),
        (block.up, layer.intermediate.dense),
        (block.down, layer.output.dense),
        (block.norm1, layer.layernorm_before),
        (block.norm2, layer.layernorm_after),
    ):
        mine.load_state_dict(theirs.state_dict())


class SimSiamHeads(nn.Module):
    """Projector and predictor, as published: linear layers with ReLU, no batch norm."""

    def __init__(self, config: FusionConfig):
        super().__init__()
        sizes = [config.width, *config.projector]
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(sizes):
            layers += [nn.Linear(before, after), nn.ReLU()]
        self.projector = nn.Sequential(*layers[:-1])
        self.predictor = nn.Sequential(
            nn.Linear(sizes[-1], config.predictor), nn.ReLU(), nn.Linear(config.predictor, sizes[-1])
        )

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Projection z and prediction p of every row."""
        z_TD = self.projector(x_TD)
        return z_TD, self.predictor(z_TD)
