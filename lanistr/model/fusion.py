"""The multimodal encoder and the SimSiam heads.

Shape suffixes: T packed fusion rows, D width, S sequences.
"""

import itertools

import torch
from torch import Tensor, nn

from lanistr.batch import FusionIndex
from lanistr.config import FusionConfig
from lanistr.ops.transformer import Block


class FusionEncoder(nn.Module):
    """[CLS] and the tokens of all present modalities through pre-norm layers (paper section 3.2; FLAVA's encoder).

    An absent modality has no tokens: nothing attends to a placeholder.
    """

    def __init__(self, config: FusionConfig, backend: str):
        super().__init__()
        width = config.width
        self.cls = nn.Parameter(torch.zeros(1, width))
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

    def assemble(self, pools: list[Tensor], index: FusionIndex) -> Tensor:
        """Put [CLS] and the tokens of each sample's present modalities one after the other.

        Args:
            pools: tokens of each modality, (rows of all views, D), in the order that ``index`` was made for.
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
