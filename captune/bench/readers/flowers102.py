"""102 Category Flowers (Nilsback & Zisserman, ICVGIP 2008): 10 train and 10 val images per class, 6,149 for test."""

from pathlib import Path
from typing import Final

from captune.bench.data import Benchmark, Entry, LayoutError, Reading
from captune.bench.files import Release, drop_missing
from shared.schemas.common import Split

TITLE: Final = "Flowers102"
ARCHIVES: Final = "102flowers.tgz (jpg/), imagelabels.mat and setid.mat"
PARTS: Final[tuple[tuple[Split, str], ...]] = (("train", "trnid"), ("val", "valid"), ("test", "tstid"))

# The release numbers its classes; these are the names on its page, in that order.
_LISTED: Final = """pink primrose, hard-leaved pocket orchid, canterbury bells, sweet pea, english marigold, tiger lily,
    moon orchid, bird of paradise, monkshood, globe thistle, snapdragon, colt's foot, king protea, spear thistle,
    yellow iris, globe-flower, purple coneflower, peruvian lily, balloon flower, giant white arum lily, fire lily,
    pincushion flower, fritillary, red ginger, grape hyacinth, corn poppy, prince of wales feathers, stemless gentian,
    artichoke, sweet william, carnation, garden phlox, love in the mist, mexican aster, alpine sea holly,
    ruby-lipped cattleya, cape flower, great masterwort, siam tulip, lenten rose, barbeton daisy, daffodil, sword lily,
    poinsettia, bolero deep blue, wallflower, marigold, buttercup, oxeye daisy, common dandelion, petunia, wild pansy,
    primula, sunflower, pelargonium, bishop of llandaff, gaura, geranium, orange dahlia, pink-yellow dahlia,
    cautleya spicata, japanese anemone, black-eyed susan, silverbush, californian poppy, osteospermum, spring crocus,
    bearded iris, windflower, tree poppy, gazania, azalea, water lily, rose, thorn apple, morning glory, passion flower,
    lotus, toad lily, anthurium, frangipani, clematis, hibiscus, columbine, desert-rose, tree mallow, magnolia,
    cyclamen, watercress, canna lily, hippeastrum, bee balm, ball moss, foxglove, bougainvillea, camellia, mallow,
    mexican petunia, bromelia, blanket flower, trumpet creeper, blackberry lily"""
NAMES: Final = tuple(name.strip() for name in _LISTED.split(","))


def read(root: Path, seed: int) -> Reading:
    """`jpg/image_00001.jpg` …; imagelabels.mat: `labels`, 1 to 102 by image; setid.mat: image numbers (from 1) of
    `trnid`, `valid`, `tstid`."""
    release = Release(
        root, "imagelabels.mat", title=TITLE, archives=ARCHIVES, folders=("flowers-102", "oxford_flowers")
    )
    release.need("jpg")
    labels = [int(each) for each in release.field(release.mat("imagelabels.mat"), "labels", "imagelabels.mat")]
    if unknown := sorted({label for label in labels if not 1 <= label <= len(NAMES)}):
        raise LayoutError(f"{TITLE}: imagelabels.mat holds the label {unknown[0]}; there are 1 to {len(NAMES)}")
    parts = release.mat("setid.mat")
    reading = Reading(release.root, notes=["splits of the release (10 train and 10 val images per class)"])
    for split, name in PARTS:
        for number in map(int, release.field(parts, name, "setid.mat")):
            if not 1 <= number <= len(labels):
                raise LayoutError(f"{TITLE}: setid.mat names image {number}; imagelabels.mat has {len(labels)}")
            reading.entries.append(Entry(f"jpg/image_{number:05d}.jpg", NAMES[labels[number - 1] - 1], split))
    drop_missing(reading)
    return reading


BENCHMARK: Final = Benchmark(
    TITLE, "flowers", ARCHIVES, read, paper=94.09, images=8189, test=6149, images_in=("jpg", "")
)
