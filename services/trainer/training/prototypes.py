"""A run's texts to embeddings in bulk, and class prototypes. Shapes: T texts, L tokens, C classes, D embedding."""

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from shared.clip.loading import LoadedClip


class TextTable:
    """A run's distinct texts, tokenised once: `tokens` (T, L) int64."""

    def __init__(self, clip: LoadedClip, texts: Iterable[str]) -> None:
        distinct = list(dict.fromkeys(texts))
        self._row = {text: i for i, text in enumerate(distinct)}
        self.tokens: Tensor = clip.tokenizer(distinct)

    def rows(self, texts: Sequence[str]) -> Tensor:
        """Rows of `tokens` that hold `texts`, which must all have been given at the start."""
        return torch.tensor([self._row[text] for text in texts], dtype=torch.int64)


def class_prototypes(table: TextTable, rows: Sequence[Tensor], encode: Callable[[Tensor], Tensor]) -> Tensor:
    """Normalised mean of the normalised embeddings of each class's texts: (C, D) float32. `rows[c]` are the table's
    rows of class c, repeats counting as often as they occur; encode: tokens (T, L) -> (T, D), given each text once."""
    wanted, place = torch.unique(torch.cat(list(rows)), return_inverse=True)
    embeddings = encode(table.tokens[wanted])
    means = [embeddings[part].mean(0) for part in torch.split(place, [len(r) for r in rows])]
    return F.normalize(torch.stack(means), dim=-1)
