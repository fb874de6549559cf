"""`attributes`: captions without a language model. Colours, silhouette, proportions and texture are measured, a gated
ImageNet tag is added, and fixed phrases say it. Weak beside a real multimodal model, but true, fast and offline."""

import hashlib
import random
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image

from services.captioner.attributes import phrasing
from services.captioner.attributes.measure import Measurement, measure
from services.captioner.attributes.tag import Tagger
from services.captioner.engines.base import CaptionRequest, Engine, Generation
from shared.errors import InvalidInput

VERSION = "1"  # raise with every change of measuring or phrasing: captions are cached by revision
LONGEST = 320  # pixels; all grids are coarser, and the tag's view is 224
REMEMBERED = 512  # pictures whose measurements are kept: a picture's prompts may come in different batches


@dataclass(frozen=True)
class _Prepared:
    request: CaptionRequest
    image: Image.Image
    key: str  # of the pixels
    words: int


@dataclass(frozen=True)
class _Seen:
    measurement: Measurement
    tag: str | None


class AttributesEngine(Engine):
    """See the module. `request.metadata`: class_name, characteristic, words; all optional."""

    precision = "fp32"
    default_max_batch = 48

    def load(self) -> None:
        """Loads EfficientNet-Lite0. Raises Unavailable where its package is missing."""
        self._tagger = Tagger()
        self._seen: OrderedDict[str, _Seen] = OrderedDict()
        self.revision = f"attributes-{VERSION}+efficientnet-lite0"

    def prepare(self, request: CaptionRequest) -> _Prepared:
        if len(request.images) != 1:
            raise InvalidInput(
                f"The engine 'attributes' describes one picture per request; this one has {len(request.images)}.",
                code="one_image_required",
                param="messages",
            )
        words = request.metadata.get("words", "50")
        if not words.isdecimal() or not 5 <= int(words) <= 200:
            raise InvalidInput(
                f"metadata.words is {words!r}; give a number of words from 5 to 200.",
                code="invalid_words",
                param="metadata.words",
            )
        image = request.images[0].convert("RGB")
        image.thumbnail((LONGEST, LONGEST), reducing_gap=2.0)
        key = hashlib.blake2b(image.tobytes(), digest_size=16, person=f"{image.width}x{image.height}".encode())
        return _Prepared(request, image, key.hexdigest(), int(words))

    def generate(self, prepared: Sequence[_Prepared]) -> list[tuple[_Prepared, _Seen]]:
        """Measures and tags every different picture of the batch once, also when three prompts ask about it."""
        new = {item.key: item.image for item in prepared if item.key not in self._seen}
        for key, image, tag in zip(new, new.values(), self._tagger.tag(list(new.values())), strict=True):
            self._seen[key] = _Seen(measure(image), tag)
        answers = [(item, self._seen[item.key]) for item in prepared]
        for item in prepared:
            self._seen.move_to_end(item.key)
        while len(self._seen) > REMEMBERED:
            self._seen.popitem(last=False)
        return answers

    def finish(self, raw: tuple[_Prepared, _Seen]) -> Generation:
        item, seen = raw
        request, metadata = item.request, item.request.metadata
        characteristic = metadata.get("characteristic") or _asked_for(request.prompt)
        rng = random.Random(f"{item.key}/{characteristic}/{request.seed}")  # a string seeds the same in every process
        text = phrasing.phrase(
            seen.measurement,
            _class_name(metadata),
            characteristic,
            seen.tag,
            item.words,
            request.max_tokens,
            rng,
        )
        return Generation(text, "stop", _count(request.prompt), _count(text))


def _class_name(metadata: Mapping[str, str]) -> str:
    return " ".join(metadata.get("class_name", "").split()) or "subject"


def _asked_for(prompt: str) -> str:
    """The first characteristic that the prompt names; "visual" where it names none."""
    words = re.findall(r"[a-z]+", prompt.lower())
    return next((word for word in words if word in phrasing.KNOWN), "visual")


def _count(text: str) -> int:
    return phrasing.estimate_tokens(text)
