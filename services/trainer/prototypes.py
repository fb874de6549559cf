"""A run's texts to embeddings in bulk, class prototypes, top-1. Shapes: T texts, L tokens, C classes, D embedding."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shared.clip import LoadedClip, encode_tokens


class TextTable:
    """A run's distinct texts, tokenised once: `tokens` (T, L) int64."""

    def __init__(self, clip: LoadedClip, texts: Iterable[str]) -> None:
        distinct = list(dict.fromkeys(texts))
        self._row = {text: i for i, text in enumerate(distinct)}
        self.tokens: Tensor = clip.tokenizer(distinct)

    def rows(self, texts: Sequence[str]) -> Tensor:
        """Rows of `tokens` that hold `texts`, which must all have been given at the start."""
        return torch.tensor([self._row[text] for text in texts])


def class_prototypes(model: Any, table: TextTable, rows: Sequence[Tensor]) -> Tensor:
    """Normalised mean of the normalised embeddings of each class's texts: (C, D) float32 on the CPU. `rows[c]` are the
    table's rows of class c, repeats counting as often as they occur."""
    wanted, place = torch.unique(torch.cat(list(rows)), return_inverse=True)
    embeddings = encode_tokens(model, table.tokens[wanted])
    means = [embeddings[part].mean(0) for part in torch.split(place, [len(r) for r in rows])]
    return F.normalize(torch.stack(means), dim=-1)


def top1(image_emb: Tensor, prototypes: Tensor, labels: Tensor) -> float:
    """Share of images (N, D) whose nearest prototype (C, D) by cosine is that of their label (N,)."""
    return float(((image_emb @ prototypes.T).argmax(1) == labels).double().mean())
