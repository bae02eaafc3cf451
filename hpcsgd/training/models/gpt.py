"""GPT: a small decoder-only transformer."""

from __future__ import annotations

from typing import Annotated, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpcsgd.errors import BadOption
from hpcsgd.registry import Within, checked

Width = Annotated[int, Within(1, 2**16)]


@checked
def gpt(
    shape: tuple[int, ...],
    classes: int,
    layers: Annotated[int, Within(1, 10_000)] = 4,
    heads: Width = 4,
    width: Width = 128,
) -> nn.Module:
    """Decoder-only transformer: pre-norm, GELU, learned positions, tied embedding and head.

    Parameters
    ----------
    shape
        (context,), the longest input: option ``context`` of the data set, 64 by default.
    classes
        Size of the vocabulary.
    layers, heads, width
        Number of blocks, attention heads a block, and size of an embedding, a multiple of ``heads``.
        Default 4, 4 and 128.

    Notes
    -----
    Radford et al., Language models are unsupervised multitask learners, 2019.
    """
    if len(shape) != 1:
        raise BadOption(
            "gpt needs tokens", expected="inputs of shape (context,), as from --data text", got=shape
        )
    if width % heads:
        raise BadOption(
            "the options of gpt do not fit together",
            expected="a width that is a multiple of heads",
            got=f"heads={heads}, width={width}",
        )
    return GPT(classes, shape[0], layers, heads, width)


class GPT(nn.Module):
    """Maps tokens to logits of the next token: (n, t) int64 to (n, t, vocabulary), t up to context."""

    def __init__(self, vocabulary: int, context: int, layers: int, heads: int, width: int) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        for table in (self.token, self.position):
            # The head shares the token table: initial logits of a normal(0, 1) table are far too large.
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        length, context = tokens.shape[1], self.position.num_embeddings
        if length > context:
            what = "the input is longer than the model's context"
            raise BadOption(what, expected=f"at most {context} tokens", got=length)
        x = self.token(tokens) + self.position(torch.arange(length, device=tokens.device))
        return F.linear(self.norm(self.blocks(x)), self.token.weight)


class Block(nn.Module):
    """Causal self-attention, then a perceptron, each with a residual connection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.project_in, self.project_out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.perceptron = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.attention_norm(x))
        return x + cast(Tensor, self.perceptron(self.norm(x)))

    def attend(self, x: Tensor) -> Tensor:
        """Return causal self-attention: each position attends to itself and the preceding ones."""
        split = self.project_in(x).unflatten(-1, (3, self.heads, -1))
        query, key, value = split.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return cast(Tensor, self.project_out(mixed.transpose(1, 2).flatten(2)))
