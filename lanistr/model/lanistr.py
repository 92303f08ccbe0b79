"""LANISTR: one encoder per modality and the fusion encoder. Single-device code.

Shape suffixes: T packed fusion rows, D width, S sequences (samples of all views).
"""

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from lanistr.batch import Batch
from lanistr.config import ModelConfig
from lanistr.modalities.base import Modality, ModalityEncoder
from lanistr.modalities.encoded import Encoded
from lanistr.model.exported import fill, read_export
from lanistr.model.fusion import FusionEncoder
from lanistr.ops.attention import resolve_backend
from lanistr.ops.transformer import checkpoint_blocks


class Lanistr(nn.Module):
    """The unimodal encoders and the fusion encoder.

    Every encoder runs in every step, in the same order: where a batch has no sample of a modality its encoder runs on
    the dummy that the collator put there. The dummy's tokens are in the pool and never gathered, so their gradient is
    exactly zero and the autograd graph is the same for every presence pattern (the law of equal work).
    """

    def __init__(self, config: ModelConfig, modalities: dict[str, Modality[Any, Any]], backend: str):
        super().__init__()
        self.encoders = nn.ModuleDict({name: m.build(config.fusion.width, backend) for name, m in modalities.items()})
        self.fusion = FusionEncoder(config.fusion, backend)
        learnt = [name for name, modality in modalities.items() if modality.absent_token]
        self.absent = nn.ParameterDict({name: 0.02 * torch.randn(1, config.fusion.width) for name in learnt})
        if config.checkpoint_activations:
            for name in self.encoders:
                self.encoder(name).checkpoint_activations()
            checkpoint_blocks(self.fusion.blocks)
        if config.compile:
            for block in [b for name in self.encoders for b in self.encoder(name).blocks()] + list(self.fusion.blocks):
                block.compile(dynamic=True)

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, trust: bool = False, device: str = "cpu") -> "Lanistr":
        """An exported model, in eval mode; of a fine-tuned one without its classifier.

        Args:
            folder: made by ``python -m lanistr export``.
            trust: also take weights in a pickle, see `lanistr.model.exported.read_export`.
            device: where to.

        Raises:
            ValueError: not an export, or not its own weights.
        """
        exported = read_export(folder, trust)
        model = build_model(exported.config.model, exported.modalities, 0, device)
        if exported.config.task == "finetune":
            model.drop_heads()
        own = {n.removeprefix("model."): w for n, w in exported.weights.items() if n.startswith("model.")}
        fill(model, own, str(folder))
        return model.to(device).eval()

    def drop_heads(self) -> None:
        """Drop what only pretraining needs."""
        for name in self.encoders:
            self.encoder(name).head = nn.Identity()

    def encoder(self, name: str) -> ModalityEncoder[Any]:
        """The encoder of one modality."""
        return cast(ModalityEncoder[Any], self.encoders[name])

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Encode and fuse.

        Returns:
            (T, D) fused rows of all views, and per modality the encoder's hidden states (what `reconstruct` takes).
        """
        tokens_TD, hidden = self.tokens(batch)
        return self.fusion(tokens_TD, batch.fusion), hidden

    def tokens(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Encode only.

        Returns:
            (T, D) projected rows of all views, in the order of fusion, and the encoders' hidden states (those of a frozen
            encoder may be in the batch already).
        """
        pools, hidden = self.pools(batch)
        return self.fusion.assemble(pools, batch.fusion), hidden

    def entering(self, name: str, hidden: dict[str, Tensor], batch: Batch) -> Tensor:
        """Those of a modality's hidden states that enter fusion."""
        inputs = batch.inputs[name]
        return hidden[name] if isinstance(inputs, Encoded) else self.encoder(name).entering(hidden[name], inputs)

    def pools(self, batch: Batch) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Projected rows of all views per modality, then tokens for absent ones; and what `tokens` returns beside them."""
        hidden: dict[str, Tensor] = {}
        pools: list[Tensor] = []
        for name in self.encoders:
            encoder, inputs = self.encoder(name), batch.inputs[name]
            if isinstance(inputs, Encoded):
                hidden[name] = inputs.rows_RH
                pools.append(encoder.projection(inputs.rows_RH.to(next(encoder.projection.parameters()).dtype)))
            else:
                hidden[name] = encoder.encode(inputs)
                pools.append(encoder.project(hidden[name], inputs))
        # In the order of the modalities: a `ParameterDict` may sort its names.
        pools += [self.absent[name].to(pools[0].dtype) for name in self.encoders if name in self.absent]
        return pools, hidden


def build_model(
    config: ModelConfig,
    modalities: dict[str, Modality[Any, Any]],
    seed: int,
    device: str = "cpu",
    precision: str = "float32",
) -> Lanistr:
    """A freshly initialised model on the CPU, the same on every rank.

    Args:
        config: sizes.
        modalities: from `lanistr.modalities.make_modalities`.
        seed: of the initialisation; torch's global generator is left untouched.
        device, precision: where and in what it will run, which decides the attention backend.

    Raises:
        ValueError: a requested attention backend is not available.
    """
    backend = resolve_backend(config.attention, device, precision)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Lanistr(config, modalities, backend)
