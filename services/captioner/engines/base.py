"""The contract between the captioner and whatever turns pictures into sentences.

A request passes through three steps so that the device never waits for Python:

* ``prepare`` runs on CPU threads, one request at a time (decode, resize, tokenize);
* ``generate`` runs on a thread that owns the device, on a batch (an engine whose model is elsewhere may ask for many
  such threads, ``lanes``);
* ``finish`` runs on the CPU again and turns a raw output into text and counts.

An engine keeps no queue and starts no thread: that is the batcher's business.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Literal

from PIL import Image

from services.captioner.settings import EngineSpec

FinishReason = Literal["stop", "length"]

_NO_METADATA: Mapping[str, str] = MappingProxyType({})


def fit(image: Image.Image, max_pixels: int) -> Image.Image:
    """The picture itself, or a copy of the same proportions scaled down to at most ``max_pixels`` of area."""
    area = image.width * image.height
    if area <= max_pixels:
        return image
    scale = (max_pixels / area) ** 0.5
    size = (max(1, int(image.width * scale)), max(1, int(image.height * scale)))
    return image.resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0)


@dataclass(frozen=True)
class CaptionRequest:
    """One prompt over zero or more RGB pictures.

    ``metadata`` is what the caller knows besides the prompt (``class_name``, ``domain``,
    ``characteristic``, ``words``); engines that work without a language model read it.
    ``stop``: the text ends before the first of these. ``on_text`` is called with each new piece of the
    text as it is generated, from any thread; an engine that writes all at once need not call it, and
    the pieces joined are always a prefix of the final text.
    """

    images: tuple[Image.Image, ...]
    prompt: str
    max_tokens: int = 160
    temperature: float = 0.2
    seed: int | None = None
    stop: tuple[str, ...] = ()
    on_text: Callable[[str], None] | None = None
    metadata: Mapping[str, str] = field(default_factory=lambda: _NO_METADATA)


@dataclass(frozen=True)
class Generation:
    """A finished text with its token counts (as the engine's own tokenizer counts them)."""

    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    image_tokens: int = 0  # of the prompt tokens, those that stand for pictures


class Engine(ABC):
    """Base of all engines. Subclasses take an ``EngineSpec`` and do nothing heavy before ``load``."""

    #: The model id clients send as ``model``: the key under which the settings name this engine.
    name: str
    #: What a caption's provenance records. Changes whenever output could change (weights,
    #: precision, code version); final once ``load`` has returned.
    revision: str = "not loaded"
    #: Largest batch ``generate`` is given.
    max_batch: int
    #: Shown by ``GET /v1/models``; engines that load weights set it in ``load``.
    precision: str = "none"
    #: Largest batch when the settings name none.
    default_max_batch: ClassVar[int] = 16
    #: Threads that call ``generate`` at the same time. One where a device is owned; an engine that only waits for
    #: other servers sets it in ``__init__`` to the requests it may have in flight, with ``max_batch`` 1.
    lanes: int = 1
    #: Whether the batcher may generate a few made-up captions after loading, to measure the rate.
    warms_up: ClassVar[bool] = True

    def __init__(self, spec: EngineSpec, name: str | None = None, model_roots: Sequence[Path] = ()) -> None:
        self.spec = spec
        self.model_roots = model_roots
        self.name = name or spec.type
        self.max_batch = spec.max_batch or self.default_max_batch

    @abstractmethod
    def load(self) -> None:
        """Load weights. Called once, on one of the threads that will call ``generate``.

        Raises a ``CaptuneError`` that says what to do when the model cannot be had.
        """

    @abstractmethod
    def prepare(self, request: CaptionRequest) -> Any:
        """CPU work of one request. An error raised here is reported for this request only."""

    def bucket(self, prepared: Any) -> Hashable:
        """Requests of one bucket may share a batch; those of different buckets would hold one another up."""
        return None

    @abstractmethod
    def generate(self, prepared: Sequence[Any]) -> list[Any]:
        """One device batch of 1..``max_batch`` prepared requests; one raw output per input, same order."""

    @abstractmethod
    def finish(self, raw: Any) -> Generation:
        """CPU work after generation."""

    def device_memory(self) -> tuple[int, int] | None:
        """Bytes in use and in all of the device that the engine owns; None where it owns none. Any thread may ask."""
        return None
