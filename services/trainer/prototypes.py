"""A run's texts to embeddings in bulk, class prototypes, top-1. Shapes: T texts, L tokens, C classes, D embedding."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shared.clip import LoadedClip


def trim_padding(model: Any, tokens: Tensor) -> Tensor:
    """Drops the columns that pad every row, where the text tower masks padding and so gives the same embeddings: the
    Hugging Face towers. Theirs is the bulk of the work saved on short texts."""
    pad = getattr(getattr(getattr(model, "text", None), "config", None), "pad_token_id", None)
    if pad is None:
        return tokens
    used = (tokens != pad).any(0).nonzero()
    return tokens[:, : int(used[-1]) + 1]


class TextTable:
    """A run's distinct texts, tokenised once: `tokens` (T, L) int64."""

    def __init__(self, clip: LoadedClip, texts: Iterable[str]) -> None:
        distinct = list(dict.fromkeys(texts))
        self._row = {text: i for i, text in enumerate(distinct)}
        self.tokens: Tensor = clip.tokenizer(distinct)

    def rows(self, texts: Sequence[str]) -> Tensor:
        """Rows of `tokens` that hold `texts`, which must all have been given at the start."""
        return torch.tensor([self._row[text] for text in texts])


@torch.no_grad()
def embed_texts(model: Any, tokens: Tensor, device: torch.device, batch: int = 256) -> Tensor:
    """(T, L) -> (T, D) float32, L2-normalised, on the CPU; in batches of like length."""
    order = (tokens != 0).sum(1).argsort()
    parts = [
        model.encode_text(trim_padding(model, tokens[rows]).to(device), normalize=True).float().cpu()
        for rows in torch.split(order, batch)
    ]
    return torch.cat(parts)[order.argsort()]


def class_prototypes(model: Any, table: TextTable, rows: Sequence[Tensor], device: torch.device) -> Tensor:
    """Normalised mean of the normalised embeddings of each class's texts: (C, D) float32 on the CPU. `rows[c]` are the
    table's rows of class c, repeats counting as often as they occur."""
    wanted, place = torch.unique(torch.cat(list(rows)), return_inverse=True)
    embeddings = embed_texts(model, table.tokens[wanted], device)
    means = [embeddings[part].mean(0) for part in torch.split(place, [len(r) for r in rows])]
    return F.normalize(torch.stack(means), dim=-1)


def top1(image_emb: Tensor, prototypes: Tensor, labels: Tensor) -> float:
    """Share of images (N, D) whose nearest prototype (C, D) by cosine is that of their label (N,)."""
    return float(((image_emb @ prototypes.T).argmax(1) == labels).double().mean())
