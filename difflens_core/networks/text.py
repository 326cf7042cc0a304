"""A small text encoder for a model that draws by prompt: words to the vectors that its cross-attention reads."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

END, UNKNOWN = 0, 1  # tokens before those of the words


def tokenize(text: str, words: Sequence[str]) -> list[int]:
    """Numbers of the words of `text`; whatever is not in `words` is UNKNOWN. Case and punctuation do not count."""
    number = {word: UNKNOWN + 1 + i for i, word in enumerate(words)}
    return [number.get(word, UNKNOWN) for word in re.findall(r"[^\W\d_]+", text.lower())]


class TextEncoder(nn.Module):
    """Prompts of up to `length` words as context B x length x width; `words` is the vocabulary."""

    def __init__(self, words: Sequence[str], width: int = 128, length: int = 16, depth: int = 2, **factory: Any):
        super().__init__()
        self.words, self.width, self.length = tuple(words), width, length
        self.token = nn.Embedding(len(words) + 2, width, **factory)
        self.position = nn.Parameter(torch.zeros(length, width, **factory))
        options = {"dim_feedforward": 4 * width, "dropout": 0.0, "activation": "gelu", **factory}
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, batch_first=True, norm_first=True, **options) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width, **factory)

    def forward(self, tokens: Tensor) -> Tensor:
        """Context (B x length x width) of tokens (B x length, int64)."""
        h = self.token(tokens) + self.position
        for layer in self.layers:
            h = layer(h)
        return self.norm(h)

    def tokens(self, prompts: Sequence[str]) -> Tensor:
        """Tokens (B x length) of prompts, cut at `length` words and filled up with END."""
        rows = [tokenize(prompt, self.words)[: self.length] for prompt in prompts]
        return torch.tensor([row + [END] * (self.length - len(row)) for row in rows], device=self.position.device)

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Context (B x length x width) of prompts; "" is the unconditional one."""
        return self(self.tokens(prompts))
