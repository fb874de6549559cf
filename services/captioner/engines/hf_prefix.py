"""The prompts of one picture begin alike: the picture, then the same words. That common beginning is read once.

A batch of B requests with U distinct beginnings is prefilled as U rows; the key-value cache is then spread over the B
rows and `generate` goes on with the ends, in which the prompts of a picture differ. Saved is the work of the vision
tower and of the decoder's prefill for every prompt of a picture but the first: for three prompts nearly two thirds of
both. What differs is the order of floating-point sums, nothing else.

    columns:   padding | beginning | padding | end        the mask is 0 where there is padding
"""

import logging
import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from transformers import DynamicCache

from services.captioner.engines.hf_batching import Prepared, join

logger = logging.getLogger(__name__)

#: The two ways sum in another order: by this much of the scores' norm they may differ, more at 16 bits.
_TOLERANCE, _TOLERANCE_16_BITS = 1e-3, 0.1
_WORTHWHILE = 0.75  # of the rows: with more distinct beginnings than this, spreading the cache costs what it saves


@dataclass(frozen=True)
class Plan:
    """representatives (U): a request for each distinct beginning; beginning_of (B): which of them a request has;
    cuts (B): tokens of each request's beginning."""

    representatives: list[int]
    beginning_of: list[int]
    cuts: list[int]

    def columns(self, ids: Sequence[Sequence[int]]) -> int:
        """Of the batch, the padding inside its rows included."""
        return max(self.cuts) + max(len(tokens) - cut for tokens, cut in zip(ids, self.cuts, strict=True))


class Beginnings:
    """Made by `probe`. `place` moves tensors to the device; inside `looking(requests)` pictures are encoded once."""

    def __init__(
        self,
        model: Any,
        *,
        pad_id: int,
        place: Callable[[Mapping[str, torch.Tensor]], dict[str, Any]],
        looking: Callable[[Sequence[Prepared]], AbstractContextManager[None]],
    ) -> None:
        self._model, self._pad_id, self._place, self._looking = model, pad_id, place, looking
        self._image_token = int(model.config.image_token_id)
        # A sliding window counts columns, so padding inside a row would push real tokens out of it.
        window = getattr(model.config.get_text_config(), "sliding_window", None)
        self.window: float = math.inf if window is None else window

    @classmethod
    def probe(
        cls, model: Any, items: Sequence[Prepared], whole: dict[str, Any], *, name: str, **how: Any
    ) -> Self | None:
        """A `Beginnings` if going on from one gives what `whole`, all of the same requests, gives on this model; else
        None, the reason logged. `items`: at least two prompts over one picture, and one over another."""
        try:
            found = cls(model, **how)
            with torch.inference_mode():
                shared = found.inputs(items)
                reason = "nothing to share" if shared is None else difference(model, whole, shared)
        except Exception as error:  # architectures fail in ways of their own; each means that this one cannot share
            reason = f"{type(error).__name__}: {error}"
        if reason:
            logger.warning("engine %s: every prompt is read from its beginning (%s)", name, reason)
            return None
        logger.info("engine %s: the prompts of a picture share what they begin with", name)
        return found

    def inputs(self, prepared: Sequence[Prepared]) -> dict[str, Any] | None:
        """What `generate` goes on from: ids and mask (B, L) and a cache of what is read already; None where the prompts
        have too little in common."""
        if any(item.request.images and not item.image_keys for item in prepared):
            return None  # pictures that have no names cannot be told apart
        ids = [item.tensors["input_ids"][0].tolist() for item in prepared]
        made = plan(ids, [item.image_keys for item in prepared], self._image_token)
        if made is None or made.columns(ids) + max(item.request.max_tokens for item in prepared) > self.window:
            return None
        with self._looking([prepared[row] for row in made.representatives]):
            cache = prefill(self._model, self._place(beginnings(prepared, made, self._pad_id)), made)
        return {**self._place(whole_rows(prepared, made, self._pad_id)), "past_key_values": cache}


def plan(ids: Sequence[Sequence[int]], pictures: Sequence[Hashable], image_token: int) -> Plan | None:
    """What B prompts (token ids of any lengths) over the given pictures can share; None if it is not worth it."""
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for row, picture in enumerate(pictures):
        groups[picture].append(row)
    cuts = {row: _common([ids[r] for r in rows]) for rows in groups.values() if len(rows) > 1 for row in rows}
    longest = max((len(ids[row]) - cut for row, cut in cuts.items()), default=0)
    for row, tokens in enumerate(ids):  # one that shares nothing may as well be cut where the others are
        if row not in cuts:
            cuts[row] = min(max(len(tokens) - longest, _after_pictures(tokens, image_token), 1), len(tokens) - 1)
    if any(cut < max(1, _after_pictures(ids[row], image_token)) for row, cut in cuts.items()):
        return None  # a picture belongs to the beginning as a whole
    found: dict[Hashable, int] = {}
    representatives: list[int] = []
    beginning_of: list[int] = []
    for row, (tokens, picture) in enumerate(zip(ids, pictures, strict=True)):
        beginning = (picture, tuple(tokens[: cuts[row]]))
        if beginning not in found:
            found[beginning] = len(representatives)
            representatives.append(row)
        beginning_of.append(found[beginning])
    if len(representatives) > _WORTHWHILE * len(ids):
        return None
    return Plan(representatives, beginning_of, [cuts[row] for row in range(len(ids))])


def beginnings(prepared: Sequence[Prepared], made: Plan, pad_id: int) -> dict[str, torch.Tensor]:
    """The U distinct beginnings as one left-padded batch, pictures included."""
    return join([_part(prepared[row], slice(made.cuts[row])) for row in made.representatives], pad_id)


def whole_rows(prepared: Sequence[Prepared], made: Plan, pad_id: int) -> dict[str, torch.Tensor]:
    """ids and mask of all B rows, in the columns that `beginnings` and the ends take; no pictures."""
    texts = [
        replace(item, tensors={key: item.tensors[key] for key in ("input_ids", "attention_mask")}) for item in prepared
    ]
    first = join([_part(item, slice(cut)) for item, cut in zip(texts, made.cuts, strict=True)], pad_id)
    ends = join([_part(item, slice(cut, None)) for item, cut in zip(texts, made.cuts, strict=True)], pad_id)
    return {key: torch.cat([first[key], ends[key]], dim=1) for key in first}


def prefill(model: Any, batch: dict[str, torch.Tensor], made: Plan) -> DynamicCache:
    """Read `beginnings` (on the device); returns a cache of B rows, for `generate` to go on from with `whole_rows`.

    Models with multimodal rotary positions keep an offset per row (`rope_deltas`) between calls: it is spread too.
    """
    cache = DynamicCache(config=model.config.get_text_config())
    # One token is drawn and thrown away: `generate` knows how to make each architecture's positions and masks.
    model.generate(**batch, past_key_values=cache, max_new_tokens=1)
    index = torch.tensor(made.beginning_of, device=batch["input_ids"].device)
    cache.batch_select_indices(index)
    inner = model.base_model
    if getattr(inner, "rope_deltas", None) is not None:
        inner.rope_deltas = inner.rope_deltas[index]
    return cache


def difference(model: Any, whole: dict[str, Any], shared: dict[str, Any]) -> str | None:
    """Why prompts may not be begun together on this model, or None: the scores of the first two new tokens are compared
    between `generate` on `whole` (all of every row) and on `shared` (ids, mask and what `prefill` returned)."""
    answers = [
        model.generate(**inputs, max_new_tokens=2, min_new_tokens=2, output_scores=True, return_dict_in_generate=True)
        for inputs in (whole, shared)
    ]
    same = answers[0].sequences[:, -2] == answers[1].sequences[:, -2]  # else the second step follows another token
    wide = model.dtype == torch.float32
    for step, rows in enumerate((slice(None), same)):
        expected, found = (answer.scores[step][rows].float() for answer in answers)
        # A score that is switched off is the same -inf in both.
        expected, found = (scores.masked_fill(scores.isinf(), 0) for scores in (expected, found))
        distance = float((expected - found).norm() / expected.norm().clamp_min(1e-9))
        if not distance <= (_TOLERANCE if wide else _TOLERANCE_16_BITS):
            return f"scores of new token {step + 1} differ by {distance:.2g} of their norm"
    return None


def _part(item: Prepared, columns: slice) -> Prepared:
    """The same request with only these of its tokens; pictures stay whole."""
    along = item.tensors["input_ids"].shape
    return replace(item, tensors={k: v[:, columns] if v.shape == along else v for k, v in item.tensors.items()})


def _after_pictures(tokens: Sequence[int], image_token: int) -> int:
    return max((place + 1 for place, token in enumerate(tokens) if token == image_token), default=0)


def _common(rows: Sequence[Sequence[int]]) -> int:
    """Length of the longest common beginning, short of a whole row: something has to be left to go on from."""
    length = 0
    for tokens in zip(*rows, strict=False):
        if len(set(tokens)) > 1:
            break
        length += 1
    return min(length, min(map(len, rows)) - 1)
