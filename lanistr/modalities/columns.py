"""A token per column of a table, beside TabNet's steps.

Shape suffixes: N rows of one view, R numeric columns, C categorical columns, K = R + C columns, D width.
"""

import torch
from torch import Tensor, nn

START = (
    0.3  # deviation of every vector at the start: TabNet's tokens, means of a few rectified numbers, are of that size
)


class ColumnTokens(nn.Module):
    """FT-Transformer's tokenizer (Gorishniy et al. 2021, section 3.3): a vector times the number, or one per category.

    To both a bias of the column is added, which says which column it is. TabNet passes on a few numbers of those columns
    that its masks choose; a token per column leaves the choice to the fusion encoder.
    """

    def __init__(self, numeric: int, cardinality: list[int], width: int):
        super().__init__()
        self.weight = nn.Parameter(START * torch.randn(numeric, width))
        self.embedding = nn.Embedding(max(1, sum(cardinality)), width)
        self.bias = nn.Parameter(START * torch.randn(numeric + len(cardinality), width))
        with torch.no_grad():
            self.embedding.weight.mul_(START)

    def forward(self, numeric_NR: Tensor, rows_NC: Tensor) -> Tensor:
        """(N, K, D), at least float32.

        Args:
            numeric_NR: scaled numbers; a missing one is 0, the mean.
            rows_NC: of the embedding, one table of all columns.
        """
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        numbers_NRD = numeric_NR.to(dtype)[:, :, None] * self.weight.to(dtype)
        categories_NCD = self.embedding(rows_NC).to(dtype)
        return torch.cat([numbers_NRD, categories_NCD], dim=1) + self.bias.to(dtype)

    def hide(self, tokens_NKD: Tensor, keep_NK: Tensor, mask_D: Tensor) -> Tensor:
        """The tokens of another view: the mask token, with the column's bias, where ``keep_NK`` is 0."""
        hidden_KD = (mask_D + self.bias).to(tokens_NKD.dtype)
        return torch.where(keep_NK[:, :, None] > 0, tokens_NKD, hidden_KD)
