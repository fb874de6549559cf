"""Predictions over the API: which classifiers stay loaded, how many images may wait, which go through a model together.
No torch: models are loaded by loading.py, which is imported when the first one is asked for."""

import asyncio
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from services.evaluator.settings import EvaluatorSettings
from shared.classifier.card import ClassifierCard
from shared.core import Core
from shared.errors import InvalidInput, TooBusy


class Model(Protocol):
    card: ClassifierCard

    def prepare(self, image: bytes) -> Any:
        """Decodes and resizes. Raises InvalidInput for what is no picture."""

    def probabilities(self, prepared: Sequence[Any]) -> list[list[float]]:
        """One row per image, one number per class."""


class Predictor:
    """models: how many stay loaded, the least recently used goes first. queue: images of all requests that wait or are
    worked on; a request beyond it is refused with TooBusy. batch: images that go through a model together.
    body_bytes: of all requests whose images are in memory as files."""

    def __init__(self, *, models: int, queue: int, batch: int, body_bytes: int) -> None:
        self._models, self._queue, self._batch, self._body_bytes = models, queue, batch, body_bytes
        self._loaded: OrderedDict[str, Future[Model]] = OrderedDict()
        self._waiting: deque[_Item] = deque()
        self._admitted = self._held = 0
        self._lock = threading.Lock()
        self._loader = ThreadPoolExecutor(1, "classifier-loader")
        self._cpu = ThreadPoolExecutor(2, "classifier-images")
        self._device = ThreadPoolExecutor(1, "classifier-device")

    async def predict(
        self, key: str, load: Callable[[], Model], names: Sequence[str], images: Sequence[bytes]
    ) -> tuple[ClassifierCard, list[list[float]]]:
        """The classifier's card, and its probabilities for each image. `key` names the classifier; `load` is called
        where it is not loaded. Raises what `load` and `Model.prepare` raise, saying which image, and TooBusy."""
        with self._admit(len(images)):
            model = await asyncio.shield(asyncio.wrap_future(self._model(key, load)))  # others may wait for it too
            prepared = await asyncio.wrap_future(self._cpu.submit(_prepare, model, names, images))
            item = _Item(model, prepared)
            with self._lock:
                self._waiting.append(item)
            self._device.submit(self._run)
            return model.card, await asyncio.wrap_future(item.future)

    @contextmanager
    def holding(self, size: int) -> Iterator[None]:
        """While a request's body of `size` bytes is read and kept. Raises TooBusy where those of others leave no room;
        alone it is never too large."""
        with self._lock:
            if self._held and self._held + size > self._body_bytes:
                raise TooBusy(
                    f"requests of {self._held} bytes wait for a prediction already; send yours again later",
                    code="queue_full",
                    retry_after=1,
                )
            self._held += size
        try:
            yield
        finally:
            with self._lock:
                self._held -= size

    @contextmanager
    def _admit(self, images: int) -> Iterator[None]:
        with self._lock:
            if self._admitted and self._admitted + images > self._queue:
                raise TooBusy(
                    f"{self._admitted} images wait for a prediction already, and {self._queue} may; send yours again "
                    "later, or fewer at a time",
                    code="queue_full",
                    retry_after=1,
                )
            self._admitted += images
        try:
            yield
        finally:
            with self._lock:
                self._admitted -= images

    def _model(self, key: str, load: Callable[[], Model]) -> Future[Model]:
        with self._lock:
            known = self._loaded.get(key)
            if known is not None and not (known.done() and known.exception() is not None):
                self._loaded.move_to_end(key)
                return known
            future = self._loaded[key] = self._loader.submit(load)
            self._loaded.move_to_end(key)
            while len(self._loaded) > self._models:
                self._loaded.popitem(last=False)  # requests that hold it still end well
            return future

    def _run(self) -> None:
        """One batch: the request that has waited longest, and what else waits for the same model and fits."""
        with self._lock:
            items = self._take()
        if not items:
            return  # an earlier batch took it along
        prepared = [image for item in items for image in item.prepared]
        try:
            rows = items[0].model.probabilities(prepared)
            if len(rows) != len(prepared):
                raise RuntimeError(f"{len(rows)} predictions for {len(prepared)} images")
        except BaseException as error:
            for item in items:
                item.future.set_exception(error)
            return
        for item in items:
            item.future.set_result(rows[: len(item.prepared)])
            rows = rows[len(item.prepared) :]

    def _take(self) -> "list[_Item]":
        taken: list[_Item] = []
        size = 0
        for item in list(self._waiting):
            if taken and (item.model is not taken[0].model or size + len(item.prepared) > self._batch):
                continue
            self._waiting.remove(item)
            if item.future.set_running_or_notify_cancel():
                taken.append(item)
                size += len(item.prepared)
        return taken


def load(core: Core, settings: EvaluatorSettings, storage_key: str) -> Model:
    """A classifier of the store, ready to serve. Raises what `load_classifier` does."""
    from services.evaluator.prediction import loading

    return loading.load(core, settings, storage_key)


def check(core: Core, settings: EvaluatorSettings, folder: Path) -> ClassifierCard:
    """The card of a folder that loads as a classifier. Raises what `load_classifier` does."""
    from services.evaluator.prediction import loading

    return loading.check(core, settings, folder)


def write_standalone(core: Core, settings: EvaluatorSettings, folder: Path, target: Path) -> None:
    """Writes the classifier in `folder`, with all weights, into `target`. Raises what `load_classifier` does."""
    from services.evaluator.prediction import loading

    loading.standalone(core, settings, folder, target)


def _prepare(model: Model, names: Sequence[str], images: Sequence[bytes]) -> list[Any]:
    prepared = []
    for name, image in zip(names, images, strict=True):
        try:
            prepared.append(model.prepare(image))
        except InvalidInput as error:
            raise InvalidInput(f"the image '{name}': {error.message}", code=error.code, param="images") from error
    return prepared


@dataclass(eq=False)
class _Item:
    model: Model
    prepared: list[Any]
    future: "Future[list[list[float]]]" = field(default_factory=Future)
