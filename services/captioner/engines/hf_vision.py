"""One pass through the vision tower per picture, however many prompts ask about it.

Transformers' multimodal models encode pictures in one place, `base_model.get_image_features`, which `generate` calls
once with everything the processor made of the batch's pictures. While `VisionReuse.sharing` is open, that call is given
only the pictures that are new, and its answer is put together from theirs and from those seen shortly before. What a
picture is to that call (here a *unit*) differs: a picture (Qwen-VL, LLaVA, Gemma 3), a tile of one (InternVL), or all
pictures of a prompt (Idefics3); `unit_keys` names them.
"""

import hashlib
import inspect
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any, Self

import torch
from PIL import Image

logger = logging.getLogger(__name__)

#: Two batches of unlike size round differently: by this much of the norm at most, more where features have 16 bits.
_TOLERANCE, _TOLERANCE_16_BITS = 1e-3, 0.1

#: original get_image_features, its arguments by name -> what it would return
_Encode = Callable[[Callable[..., Any], dict[str, Any]], Any]


def picture_key(image: Image.Image) -> str:
    """A name that two pictures share only if their pixels are equal."""
    digest = hashlib.blake2b(image.tobytes(), digest_size=16).hexdigest()
    return f"{image.mode}{image.width}x{image.height}:{digest}"


def unit_keys(tensors: Mapping[str, torch.Tensor], picture_keys: Sequence[str]) -> tuple[str, ...]:
    """One key for each unit of one encoded request (see the module), from the keys of its pictures in order."""
    if "pixel_values" not in tensors:
        return ()
    units = _units(tensors)
    if units == len(picture_keys):
        return tuple(picture_keys)
    return tuple(f"{'+'.join(picture_keys)}/{unit}" for unit in range(units))


@dataclass(frozen=True)
class _Features:
    """Of one unit: what takes the place of its tokens, (tokens, width), and what deeper layers add to it."""

    pooled: torch.Tensor
    deep: tuple[torch.Tensor, ...]

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (self.pooled, *self.deep)

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


class VisionReuse:
    """Made by `probe`. Used by one thread at a time, the one that generates; `RuntimeError` otherwise."""

    def __init__(self, model: Any, *, entries: int = 256, max_bytes: int = 256 << 20) -> None:
        self._model, self._base = model, model.base_model
        self._entries, self._max_bytes = entries, max_bytes
        self._features: OrderedDict[str, _Features] = OrderedDict()
        self._bytes = 0
        self._answer: type = object  # the class get_image_features answers with, and ...
        self._stacked = False  # ... whether its features are one tensor rather than a list
        self._busy = threading.Lock()
        self.encoded = 0  # units that passed the tower ...
        self.reused = 0  # ... and units that did not have to

    @classmethod
    def probe(
        cls, model: Any, batch: Mapping[str, torch.Tensor], image_keys: Sequence[str], *, name: str, **limits: int
    ) -> Self | None:
        """A `VisionReuse` if sharing changes nothing in what `model` makes of `batch`; else None, the reason logged.

        `batch` is what `generate` takes, on the device, of at least three prompts over two unlike pictures, so that
        `image_keys` (of its units) names one picture twice, and not in neighbouring places. `limits`: how many units
        and bytes of features to keep, `entries` and `max_bytes`.
        """
        reuse = cls(model, **limits)
        try:
            reason = reuse._difference(batch, image_keys)
        except Exception as error:  # architectures fail in ways of their own; each means that this one cannot share
            reason = f"{type(error).__name__}: {error}"
        if reason:
            logger.warning("engine %s: every prompt encodes its picture anew (%s)", name, reason)
            return None
        logger.info("engine %s: prompts share the encoding of a picture", name)
        reuse.clear()
        reuse.encoded = reuse.reused = 0
        return reuse

    @contextmanager
    def sharing(self, image_keys: Sequence[str]) -> Iterator[None]:
        """Inside, `generate` encodes each unit once. `image_keys` names every unit of the batch in order, as
        `unit_keys` does; where their number is not that of the batch's units, nothing is shared."""
        with self._replaced(lambda original, arguments: self._encode(original, arguments, image_keys)):
            yield

    def clear(self) -> None:
        """Forget all features, to give their memory back."""
        self._features.clear()
        self._bytes = 0

    @contextmanager
    def _replaced(self, encode: _Encode) -> Iterator[None]:
        if not self._busy.acquire(blocking=False):
            raise RuntimeError("pictures are shared within one generate call at a time")
        try:
            original = self._base.get_image_features
            signature = inspect.signature(original)

            @wraps(original)  # generate reads the signature to choose the arguments
            def replacement(*args: Any, **kwargs: Any) -> Any:
                arguments = dict(signature.bind(*args, **kwargs).arguments)
                arguments.update(arguments.pop("kwargs", {}))
                return encode(original, arguments)

            self._base.get_image_features = replacement
            try:
                yield
            finally:
                del self._base.get_image_features  # the class's own is seen again
        finally:
            self._busy.release()

    def _encode(self, original: Callable[..., Any], arguments: dict[str, Any], keys: Sequence[str]) -> Any:
        parts = _parts(arguments)
        if parts is None or len(keys) != len(parts["pixel_values"]):
            self.encoded += len(keys)
            return original(**arguments)
        known = {key: self._features[key] for key in keys if key in self._features}
        first = {key: keys.index(key) for key in dict.fromkeys(keys) if key not in known}
        if first:
            chosen = {name: torch.cat([part[n] for n in first.values()]) for name, part in parts.items()}
            output = original(**{**arguments, **chosen})
            fresh = _split(output, len(first))
            if fresh is None:
                self.encoded += len(keys)
                return original(**arguments)
            self._answer, self._stacked = type(output), isinstance(output.pooler_output, torch.Tensor)
            known.update(zip(first, fresh, strict=True))
        self.encoded += len(first)
        self.reused += len(keys) - len(first)
        self._remember(known)
        rows = [known[key] for key in keys]
        pooled = [row.pooled for row in rows]
        answer: dict[str, Any] = {"pooler_output": torch.stack(pooled) if self._stacked else pooled}
        if rows[0].deep:
            answer["deepstack_features"] = [list(layer) for layer in zip(*(row.deep for row in rows), strict=True)]
        return self._answer(**answer)

    def _remember(self, used: Mapping[str, _Features]) -> None:
        for key, features in used.items():
            if key not in self._features:
                self._features[key] = features
                self._bytes += features.bytes
            self._features.move_to_end(key)
        while len(self._features) > self._entries or self._bytes > self._max_bytes:
            self._bytes -= self._features.popitem(last=False)[1].bytes

    def _difference(self, batch: Mapping[str, torch.Tensor], keys: Sequence[str]) -> str | None:
        """What sharing changes for `batch`, or why it cannot be told; None if nothing."""
        if not hasattr(self._base, "get_image_features"):
            return "the model has no get_image_features"
        plain, logits = self._observe(batch, lambda original, arguments: original(**arguments))
        shared, shared_logits = self._observe(
            batch, lambda original, arguments: self._encode(original, arguments, keys)
        )
        if not self.reused:
            return "its pictures cannot be told apart in what the processor makes of them"
        expected, found = _split(plain, len(keys)), _split(shared, len(keys))
        assert expected is not None  # otherwise nothing had been reused
        assert found is not None
        tolerance = _TOLERANCE if expected[0].pooled.dtype is torch.float32 else _TOLERANCE_16_BITS
        if any(
            _distance(a, b) > tolerance
            for one, other in zip(expected, found, strict=True)
            for a, b in zip(one.tensors, other.tensors, strict=True)
        ):
            return "pictures encoded together differ from pictures encoded alone"
        if _distance(logits, shared_logits) > tolerance:
            return "the next token depends on more than the features"
        return None

    def _observe(self, batch: Mapping[str, torch.Tensor], encode: _Encode) -> tuple[Any, torch.Tensor]:
        """The answer of get_image_features, and the logits of the next token, (B, V)."""
        answers: list[Any] = []

        def record(original: Callable[..., Any], arguments: dict[str, Any]) -> Any:
            answers.append(encode(original, arguments))
            return answers[-1]

        with torch.inference_mode(), self._replaced(record):
            output = self._model.generate(
                **batch, max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True
            )
        (answer,) = answers
        return answer, output.logits[0]


def _units(tensors: Mapping[str, Any]) -> int:
    grid = tensors.get("image_grid_thw")
    return len(tensors["pixel_values"] if grid is None else grid)


def _parts(arguments: Mapping[str, Any]) -> dict[str, tuple[torch.Tensor, ...]] | None:
    """Every tensor among the arguments cut into one piece per unit; None where one cannot be cut.

    Units lie along the first axis, but with an `image_grid_thw` (units, 3) the pixels are flattened patches,
    (patches of all units, values)."""
    if not isinstance(arguments.get("pixel_values"), torch.Tensor):
        return None
    units, grid = _units(arguments), arguments.get("image_grid_thw")
    parts = {}
    for name, value in arguments.items():
        if not isinstance(value, torch.Tensor):
            continue
        sizes = grid.prod(-1).tolist() if grid is not None and name == "pixel_values" else [1] * units
        if value.ndim == 0 or sum(sizes) != len(value):
            return None
        parts[name] = torch.split(value, sizes)
    return parts


def _split(output: Any, units: int) -> list[_Features] | None:
    """An answer of get_image_features -> a copy of its own for each unit, so that none keeps the others' memory; None
    where its features are not one entry per unit."""
    pooled, deep = getattr(output, "pooler_output", None), getattr(output, "deepstack_features", None) or []
    if isinstance(pooled, torch.Tensor) and pooled.ndim < 3:
        return None  # tokens of all units in one row
    layers = [pooled, *deep]
    if any(not isinstance(layer, torch.Tensor | list | tuple) or len(layer) != units for layer in layers):
        return None
    return [_Features(rows[0].clone(), tuple(row.clone() for row in rows[1:])) for rows in zip(*layers, strict=True)]


def _distance(expected: torch.Tensor, found: torch.Tensor) -> float:
    """Of the norm of `expected`; infinite where the shapes differ or a value is not a number."""
    if expected.shape != found.shape:
        return float("inf")
    distance = (expected.float() - found.float()).norm() / expected.float().norm().clamp_min(1e-30)
    return float(distance.nan_to_num(float("inf")))
