"""The text towers on as many tokens as a batch needs. Shapes: T texts, L tokens (77, mostly padding), D embedding.

A tower with a causal mask computes each position from the ones before it, and its embedding is that of one position
(the end token). So the columns after the last such position change nothing, and leaving them out is exact; open_clip's
own `encode_text` takes the full length only, hence the one here. Hugging Face towers mask padding: there the columns
that pad every text go. Other towers (bidirectional without a mask, or with a class token at the end, as CoCa's) read
every column.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from open_clip.transformer import TextTransformer
from torch import Tensor, nn


@dataclass(frozen=True)
class _Causal:
    """A causal text tower whose embedding is that of one position."""

    layers: Any  # what holds them: in open_clip's CLIP the model itself, in its CustomTextCLIP the text tower
    pool: str
    eos: int

    def end(self, tokens: Tensor) -> Tensor:
        """The position pooled, as open_clip finds it: the highest id (its end token), or the first end token. (T,)"""
        return tokens.argmax(1) if self.pool == "argmax" else tokens.eq(self.eos).int().argmax(1)


def used_columns(model: Any, tokens: Tensor) -> Tensor:
    """How many of its first columns each text's embedding depends on: (T, L) int64 -> (T,) int64."""
    causal = _causal(model)
    if causal is not None:
        return causal.end(tokens) + 1
    length = tokens.shape[1]
    pad = getattr(getattr(getattr(model, "text", None), "config", None), "pad_token_id", None)
    if pad is None:
        return torch.full((len(tokens),), length, device=tokens.device)
    return (tokens.ne(pad) * torch.arange(1, length + 1, device=tokens.device)).amax(1).clamp(min=1)


def trim_padding(model: Any, tokens: Tensor) -> Tensor:
    """(T, L) -> (T, at most L): without the columns on which no embedding of the batch depends. A tensor on a GPU would
    make this wait for the device: trim first, then move."""
    return tokens[:, : int(used_columns(model, tokens).max())] if len(tokens) else tokens


def encode_text_batch(model: Any, tokens: Tensor) -> Tensor:
    """(T, L) int64 -> (T, D), rows of length 1, on the model's device: what `model.encode_text(tokens, normalize=True)`
    gives, with gradients, and under autocast as there. Tokens on the CPU are trimmed here and then moved; tokens on a
    device are taken as they are, so that nothing waits. On a CPU texts of like length go through the tower together: a
    training step on captions takes a quarter less."""
    device = next(model.parameters()).device
    if tokens.device.type == "cpu" and len(tokens):
        if device.type != "cpu":
            return _encode(model, trim_padding(model, tokens).to(device, non_blocking=True))
        lengths, order = used_columns(model, tokens).sort(stable=True)
        cuts = spans(lengths.tolist(), cpu_tokens())
        parts = [_encode(model, tokens[order[start:stop], : int(lengths[stop - 1])]) for start, stop in cuts]
        return torch.cat(parts)[order.argsort()]
    return _encode(model, tokens)


def cpu_tokens() -> int:
    """Tokens that a CPU encodes at a time, padding counted: few enough to stay near its caches, enough for its threads.
    Measured with ViT-B-32's text tower and MiniLM on 2 threads: 1024 is best, 4096 a tenth slower."""
    return max(1024, 512 * torch.get_num_threads())


def spans(lengths: Sequence[int], budget: int) -> Iterator[tuple[int, int]]:
    """Cuts ascending lengths into runs, each of at most `budget` tokens once padded to its longest (one text at
    least)."""
    start = 0
    for i, length in enumerate(lengths):
        if i > start and (i - start + 1) * length > budget:
            yield start, i
            start = i
    yield start, len(lengths)


def _encode(model: Any, tokens: Tensor) -> Tensor:
    causal = _causal(model)
    if causal is None:
        embeddings: Tensor = model.encode_text(tokens, normalize=True)
        return embeddings
    tower, length = causal.layers, tokens.shape[1]
    dtype = tower.transformer.get_cast_dtype()
    x = tower.token_embedding(tokens).to(dtype) + tower.positional_embedding[:length].to(dtype)
    x = tower.transformer(x, attn_mask=tower.attn_mask[:length, :length])
    last = torch.arange(len(x), device=tokens.device), causal.end(tokens)
    x = tower.ln_final(x[last])  # it norms each position by itself
    if isinstance(tower.text_projection, nn.Linear):
        x = tower.text_projection(x)
    elif tower.text_projection is not None:
        x = x @ tower.text_projection
    return F.normalize(x, dim=-1)


def _causal(model: Any) -> _Causal | None:
    if isinstance(model, CLIP):
        found = _Causal(model, model.text_pool_type, model.text_eos_id)
    elif isinstance(text := getattr(model, "text", None), TextTransformer) and text.cls_emb is None:
        found = _Causal(text, text.pool_type, text.eos_id)
    else:
        return None
    return found if found.layers.attn_mask is not None and found.pool in ("argmax", "eos") else None
