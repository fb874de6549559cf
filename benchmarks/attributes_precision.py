"""How often the `attributes` engine's tag is right: the gate's precision and coverage on labelled pictures.

    python benchmarks/attributes_precision.py [DIRECTORY] [--limit 100] [--truth truth.json]

DIRECTORY holds class/picture; the sample data where not given. A tag is right if it shares a word with the class name,
or if the class lists it: in TRUTH below (breeds and the classes of the sample data) or in --truth, {"class name":
["tag", ...]}. Prints, per class, what was tagged; then the whole at several thresholds; last one JSON line. The
thresholds in services/captioner/attributes/tag.py were chosen with it; pictures that served to choose them flatter the
result.
"""

import argparse
import json
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError

from services.captioner.attributes.measure import measure
from services.captioner.attributes.tag import KINDS, NEVER, Tagger, central, whole
from shared.clip.templates import display_name

SAMPLE = Path(__file__).resolve().parents[1] / "samples" / "clipart" / "train"

BREEDS = {
    "cat": """abyssinian, bengal, birman, bombay, british shorthair, egyptian mau, maine coon, persian, ragdoll,
        russian blue, siamese, sphynx""",
    "dog": """american bulldog, american pit bull terrier, basset hound, beagle, boxer, chihuahua, english setter,
        english cocker spaniel, german shorthaired, great pyrenees, havanese, japanese chin, keeshond, leonberger,
        miniature pinscher, newfoundland, pomeranian, pug, saint bernard, samoyed, scottish terrier, shiba inu,
        staffordshire bull terrier, wheaten terrier, yorkshire terrier""",
}
MEMBERS = {
    "mammal": """dog, cat, wild dog, fox, big cat, bear, rabbit, rodent, pig, ox, horned animal, ape, monkey, lemur,
        elephant, whale, zebra, sorrel, hippopotamus, Arabian camel, koala, llama""",
    "insect": "butterfly",
    "fruit": "strawberry, orange, banana, pineapple, Granny Smith, pomegranate, fig, jackfruit",
    "vehicle": "garbage truck, fire engine, minibus, tractor, racer, sports car, jeep, ambulance, police van",
    "dessert": "ice cream, trifle, ice lolly",
    "electronic device": "desktop computer, laptop, notebook, screen, monitor, computer mouse, printer, modem, iPod",
    "tool": "hammer, screwdriver, hatchet, plane, power drill, shovel, plunger",
}
TRUTH = {breed.strip(): frozenset([kind]) for kind, breeds in BREEDS.items() for breed in breeds.split(",")}
TRUTH |= {name: frozenset(tag.strip() for tag in tags.split(",")) for name, tags in MEMBERS.items()}
SWEEP = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95)


def is_right(tag: str, class_name: str, truth: dict[str, frozenset[str]]) -> bool:
    words = {word.rstrip("s") for word in class_name.split()}
    return bool(words & {word.rstrip("s") for word in tag.lower().split()}) or tag in truth.get(class_name, frozenset())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, nargs="?", default=SAMPLE)
    parser.add_argument("--limit", type=int, default=100, help="pictures per class")
    parser.add_argument("--truth", type=Path, help="JSON: class name -> tags that are right for it")
    options = parser.parse_args()
    truth = dict(TRUTH)
    if options.truth:
        truth |= {name: frozenset(tags) for name, tags in json.loads(options.truth.read_text()).items()}

    tagger = Tagger()
    rows: list[tuple[str, str, float, bool, Path]] = []  # class, best name, confidence in both views, right, file
    measuring = tagging = 0.0
    for folder in sorted(path for path in options.directory.iterdir() if path.is_dir()):
        images, files = [], []
        for file in sorted(folder.iterdir())[: options.limit]:
            try:
                image = Image.open(file).convert("RGB")
            except (UnidentifiedImageError, OSError):
                continue
            image.thumbnail((320, 320))
            images.append(image)
            files.append(file)
        if not images:
            continue
        started = time.process_time()
        for image in images:
            measure(image)
        measuring += time.process_time() - started
        started = time.perf_counter()
        first, second = (tagger.probabilities([view(image) for image in images]) for view in (central, whole))
        tagging += time.perf_counter() - started
        for i, best in enumerate(first.argmax(1).tolist()):
            tag, name = tagger.names[best], display_name(folder.name)
            confidence = float(torch.minimum(first[i, best], second[i, best]))
            rows.append((name, tag, confidence, is_right(tag, name, truth), files[i]))
        print(f"{folder.name}: {len(images)} pictures", file=sys.stderr)
    if not rows:
        parser.error(f"{options.directory} holds no class folders with pictures")

    gate = dict(zip(tagger.names, tagger.thresholds.tolist(), strict=True))
    kept = [row for row in rows if row[2] >= gate[row[1]]]
    print(f"{'class':24} {'pictures':>8} {'tagged':>7} {'right':>6}  tags")
    for name in sorted({row[0] for row in rows}):
        own = [row for row in kept if row[0] == name]
        tags = ", ".join(f"{tag} {count}" for tag, count in Counter(row[1] for row in own).most_common(4))
        total = sum(row[0] == name for row in rows)
        print(f"{name:24} {total:8} {len(own):7} {sum(row[3] for row in own):6}  {tags}")
    print(f"\n{'threshold':>9} {'kinds: tagged':>14} {'right':>6} {'names: tagged':>14} {'right':>6}  (NEVER left out)")
    for threshold in SWEEP:
        over = [row for row in rows if row[2] >= threshold and row[1] not in NEVER]
        parts = [[row for row in over if (row[1] in KINDS) is kind] for kind in (True, False)]
        shares = [f"{len(part):14} {sum(r[3] for r in part) / max(len(part), 1):6.1%}" for part in parts]
        print(f"{threshold:9.2f} {' '.join(shares)}")
    for name, tag, confidence, right, file in kept:
        if not right:
            print(f"wrong: {tag} ({confidence:.2f}) on {name}: {file}")
    print(
        json.dumps(
            {
                "benchmark": "attributes_precision",
                "directory": options.directory.name,
                "pictures": len(rows),
                "tagged": len(kept),
                "coverage": round(len(kept) / len(rows), 4),
                "precision": round(sum(row[3] for row in kept) / len(kept), 4) if kept else None,
                "measure_cpu_ms": round(measuring / len(rows) * 1000, 2),
                "tag_two_views_ms": round(tagging / len(rows) * 1000, 2),
                "threads": torch.get_num_threads(),
            }
        )
    )


if __name__ == "__main__":
    main()
