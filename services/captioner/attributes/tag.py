"""A name for what is in the picture, from EfficientNet's 1000 ImageNet classes, only when it is very likely right.

The classifier always answers, also for what it never learned: flowers become 'daisy' or 'hair slide', hats
'pinwheel', and softmax is confident about it. The gate was tuned on real pictures (benchmarks/attributes_precision.py):

* animals are named by kind (bird, cat, dog), with the probabilities of all species of the kind added up: a species is
  often wrong and then contradicts the label, the kind rarely is;
* a second view (the whole picture, squashed and mirrored) must agree with the first (the central crop);
* classes that attract pictures of anything round, radial or drawn are never named.

Seen: 600 photographs of cats and dogs, 326 tagged, all of them right; cut-out photographs of animals, food and things,
62 of 63 right; clip art, 2% tagged.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from shared.clip.starter import NORMALISE, imagenet_names, load_efficientnet

KIND_THRESHOLD = 0.70
NAME_THRESHOLD = 0.85
BATCH = 4  # fits the caches of a CPU: 16 took a third longer per picture, and 300 MiB more
SIZE, RESIZED = 224, 256  # ImageNet's usual evaluation: shorter side to 256, central 224

# kind -> inclusive ranges of class numbers; ImageNet's animals (0 to 397) are ordered by biology
KINDS: dict[str, tuple[tuple[int, int], ...]] = {
    "fish": ((0, 6), (389, 397)),
    "bird": ((7, 24), (80, 100), (127, 146)),
    "salamander": ((25, 29),),
    "frog": ((30, 32),),
    "turtle": ((33, 37),),
    "lizard": ((38, 48),),
    "crocodile": ((49, 50),),
    "snake": ((52, 68),),
    "spider": ((72, 77),),
    "crab": ((118, 121), (125, 125)),
    "lobster": ((122, 124),),
    "whale": ((147, 148),),
    "dog": ((151, 268),),
    "wild dog": ((269, 275),),
    "fox": ((277, 280),),
    "cat": ((281, 285),),
    "big cat": ((286, 293),),
    "bear": ((294, 297),),
    "insect": ((300, 320),),
    "butterfly": ((321, 326),),
    "rabbit": ((330, 332),),
    "rodent": ((333, 338),),
    "pig": ((341, 343),),
    "ox": ((345, 347),),
    "horned animal": ((348, 353),),
    "ape": ((365, 369),),
    "monkey": ((370, 382),),
    "lemur": ((383, 384),),
    "elephant": ((385, 386),),
}
CLEARER = {"mouse, computer mouse": "computer mouse"}
# Confidently wrong on flowers, drawings, balls, coins, letters and symbols.
NEVER = frozenset(
    [
        "ballpoint",
        "beacon",
        "book jacket",
        "broom",
        "bubble",
        "buckle",
        "chain",
        "chiton",
        "comic book",
        "croquet ball",
        "daisy",
        "envelope",
        "flagpole",
        "gong",
        "gyromitra",
        "hair slide",
        "half track",
        "hook",
        "jigsaw puzzle",
        "lampshade",
        "lemon",
        "letter opener",
        "maraca",
        "mask",
        "matchstick",
        "menu",
        "nail",
        "necklace",
        "nematode",
        "packet",
        "park bench",
        "pick",
        "ping-pong ball",
        "pinwheel",
        "pole",
        "puck",
        "rubber eraser",
        "safety pin",
        "scabbard",
        "screw",
        "shield",
        "ski",
        "slot",
        "spaghetti squash",
        "spotlight",
        "trilobite",
        "velvet",
        "wall clock",
        "web site",
        "wool",
    ]
)


class Tagger:
    """Loads the classifier; `tag` answers for a batch."""

    def __init__(self) -> None:
        self.model = load_efficientnet().to(memory_format=torch.channels_last)
        names = [CLEARER.get(name, name.split(",")[0]) for name in imagenet_names()]
        grouped = torch.zeros(1000, dtype=torch.bool)
        rows, self.names = [], []
        for kind, spans in KINDS.items():
            row = torch.zeros(1000)
            for first, last in spans:
                row[first : last + 1] = 1
            grouped |= row > 0
            rows.append(row)
            self.names.append(kind)
        for index in (~grouped).nonzero().flatten().tolist():
            rows.append(torch.nn.functional.one_hot(torch.tensor(index), 1000).float())
            self.names.append(names[index])
        self.sums = torch.stack(rows)  # (kinds + single classes, 1000)
        self.thresholds = torch.tensor(
            [KIND_THRESHOLD if name in KINDS else 2.0 if name in NEVER else NAME_THRESHOLD for name in self.names]
        )

    def tag(self, images: Sequence[Image.Image]) -> list[str | None]:
        """-> a name or None for each picture. The second view costs a second pass only where the first one is sure."""
        tags: list[str | None] = [None] * len(images)
        if not images:
            return tags
        confidence, best = self.probabilities([central(image) for image in images]).max(1)
        sure = (confidence >= self.thresholds[best]).nonzero().flatten().tolist()
        if not sure:
            return tags
        second = self.probabilities([whole(images[i]) for i in sure])
        for row, i in zip(second, sure, strict=True):
            name = int(best[i])
            if row[name] >= self.thresholds[name]:
                tags[i] = self.names[name]
        return tags

    @torch.no_grad()
    def probabilities(self, views: Sequence[Image.Image]) -> torch.Tensor:
        """224 x 224 views -> (N, len(self.names))."""
        rows = []
        for start in range(0, len(views), BATCH):
            pixels = torch.stack([_tensor(view) for view in views[start : start + BATCH]])
            logits = self.model(pixels.contiguous(memory_format=torch.channels_last))
            rows.append(torch.softmax(logits, dim=1) @ self.sums.T)
        return torch.cat(rows)


def central(image: Image.Image) -> Image.Image:
    scale = RESIZED / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - SIZE) // 2, (image.height - SIZE) // 2
    return image.crop((left, top, left + SIZE, top + SIZE))


def whole(image: Image.Image) -> Image.Image:
    return image.resize((SIZE, SIZE), Image.Resampling.BICUBIC).transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def _tensor(view: Image.Image) -> torch.Tensor:
    pixels: Any = np.asarray(view, dtype=np.float32).transpose(2, 0, 1) / 255
    return (torch.from_numpy(pixels) - NORMALISE[0]) / NORMALISE[0]
