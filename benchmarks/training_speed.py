"""A whole few-shot fine-tune, validation and selection of the best epoch included: the plain way
(fine_tuning/plain.py), ours, and the compute floor (fine_tuning/floor.py), one after another in one run.

    python benchmarks/training_speed.py [--data samples/clipart] [--models ViT-B-32,starter] [--shots 16] [--epochs 50]
        [--batch 64] [--device auto] [--plain-epochs N] [--accuracy [--seeds 5]] [--throughput 64,1024]

Same pictures (JPEG files), captions, objective (MMFT), batch, epochs and seed on the same machine. ViT-B-32 and other
open_clip architectures have random weights: their speed is that of trained ones. Ours includes decoding the pictures
into an empty cache and everything the trainer's task asks of the loop. `--plain-epochs` runs the plain way for fewer
epochs, whose cost is the same each, and scales its time up. Beside the whole run: the prototypes of one epoch, both
ways, and the methods on frozen features (embeddings computed, then cached).

`--accuracy` compares the accuracies on held-out images instead, over paired seeds. `--throughput` measures training
steps on random pixels at the given batch sizes: images/s of ours and of the floor, and the arithmetic done by the
second; with `--peak-tflops` as a share of the device's peak (MFU). A table, then one JSON line.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from shared.cpu import share_cores

share_cores()

import torch  # noqa: E402
from fine_tuning import plain  # noqa: E402
from fine_tuning.floor import Floor  # noqa: E402
from fine_tuning.material import Material, gather, model  # noqa: E402
from fine_tuning.ours import Ours  # noqa: E402

from captune.tables import table  # noqa: E402
from services.trainer import methods  # noqa: E402
from services.trainer.features import Features  # noqa: E402
from services.trainer.methods.mmft import MMFT  # noqa: E402
from services.trainer.training.data import TrainData  # noqa: E402
from services.trainer.training.loop import train  # noqa: E402
from services.trainer.training.memory import freed_blocks_kept  # noqa: E402
from shared.clip.loading import LoadedClip  # noqa: E402
from shared.row_cache import RowCache  # noqa: E402

FROZEN = ("zero_shot_ensemble", "caption_prototypes", "linear_probe", "gda", "prolip")


def timed(work: Callable[[], Any], device: torch.device) -> float:
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def speed(
    clip: LoadedClip, material: Material, method: MMFT, plain_epochs: int, device: torch.device
) -> dict[str, Any]:
    hp = method.hyperparameters
    with tempfile.TemporaryDirectory() as folder:
        ours = Ours(clip, material, Path(folder), device)
        fewer = hp.model_copy(update={"epochs": plain_epochs})
        plainly = timed(lambda: plain.train(clip, material, fewer, 0, device), device) * hp.epochs / plain_epochs
        whole = timed(lambda: ours.run(method, 0), device)
        floor = Floor(clip, method, ours.data(), 0, device)
        least = floor.run()

        floor.model.eval()
        with freed_blocks_kept() if device.type == "cpu" else nullcontext():
            by_table = [timed(floor.prototypes, device) for _ in range(3)]
        by_class = [timed(lambda: plain.prototypes(floor.model, clip, material, device), device) for _ in range(3)]
        frozen = {}
        for name in FROZEN:  # first with nothing in the cache, not even pixels; then as in a group of runs
            ours.cache = RowCache(Path(folder) / name, 20 << 30)
            frozen_method = methods.build(name, {})
            first, then = (timed(partial(ours.run, frozen_method, 0), device) for _ in range(2))
            ours.cache.close()
            frozen[name] = {"first_s": round(first, 3), "cached_s": round(then, 3), "times_faster": round(whole / then)}
    return {
        "plain_s": round(plainly, 2),
        "ours_s": round(whole, 2),
        "floor_s": round(least, 2),
        "ours_over_floor": round(whole / least, 3),
        "plain_over_ours": round(plainly / whole, 2),
        "prototypes_plain_s": round(statistics.median(by_class), 3),
        "prototypes_ours_s": round(statistics.median(by_table), 3),
        "prototypes_ratio": round(statistics.median(by_class) / statistics.median(by_table), 2),
        "precision": {name: str(dtype or torch.float32)[6:] for name, dtype in floor.autocast.dtypes.items()},
        "frozen": frozen,
    }


def accuracy(clip: LoadedClip, material: Material, method: MMFT, seeds: int, device: torch.device) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        ours = Ours(clip, material, Path(folder), device)
        pixels = ours.pixels("test")
        pairs = []
        for seed in range(seeds):
            state, head, _ = plain.train(clip, material, method.hyperparameters, seed, device)
            result = ours.run(method, seed)
            pairs.append((ours.accuracy(state, head, pixels), ours.accuracy(result.model_state, result.head, pixels)))
    differences = [second - first for first, second in pairs]
    error = statistics.stdev(differences) / seeds**0.5 if seeds > 1 else None
    return {
        "seeds": seeds,
        "test_images": len(material.test.files),
        "plain": round(statistics.mean(first for first, _ in pairs), 4),
        "ours": round(statistics.mean(second for _, second in pairs), 4),
        "difference": round(statistics.mean(differences), 4),
        "standard_error": None if error is None else round(error, 4),
    }


def throughput(
    clip: LoadedClip, material: Material, batch: int, peak_tflops: float | None, device: torch.device
) -> dict[str, Any]:
    """Steps on random pixels, no validation: 8 steps an epoch, 2 epochs, the first of which warms up."""
    count, classes = 8 * batch, len(material.class_names)
    generator = torch.Generator().manual_seed(0)
    size = clip.image_size
    images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)
    captions = [material.train.captions[i % len(material.train.captions)] for i in range(count)]
    data = TrainData(images, torch.arange(count) % classes, captions, material.class_names)
    method = methods.build("mmft", {"epochs": 2, "batch_size": batch})
    assert isinstance(method, MMFT)
    features = Features(material.class_names, torch.zeros(classes, clip.config["model_cfg"]["embed_dim"]), 1.0)
    ends: list[float] = []
    train(
        clip,
        method,
        data,
        features=features,
        seed=0,
        on_epoch=lambda _: ends.append(time.perf_counter()),  # an epoch ends when the device has caught up
        device=str(device),
    )
    ours = count / (ends[1] - ends[0])
    floor = Floor(clip, method, data, 0, device)
    flops = floor.flops()
    least = 2 * count / floor.run()
    tflops = ours / batch * flops / 1e12
    return {
        "batch": batch,
        "images_per_s": round(ours, 1),
        "floor_images_per_s": round(least, 1),
        "tflops": round(tflops, 2),
        "mfu": None if peak_tflops is None else round(tflops / peak_tflops, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("samples/clipart"))
    parser.add_argument("--models", default="ViT-B-32,starter")
    parser.add_argument("--shots", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--plain-epochs", type=int, help="of the plain way, scaled up; not given: all")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--captions", type=int, default=3, help="per image")
    parser.add_argument("--words", type=int, default=40, help="per caption, on average")
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--accuracy", action="store_true")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--throughput", help="batch sizes, by commas")
    parser.add_argument("--peak-tflops", type=float, help="the device's, at the precision used")
    arguments = parser.parse_args()
    name = ("cuda" if torch.cuda.is_available() else "cpu") if arguments.device == "auto" else arguments.device
    device = torch.device(name)
    hyperparameters = {
        "epochs": arguments.epochs,
        "batch_size": arguments.batch,
        "learning_rate": arguments.learning_rate,
    }
    method = methods.build("mmft", hyperparameters)
    assert isinstance(method, MMFT)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        (place / "jpeg").mkdir()
        material = gather(arguments.data, place / "jpeg", arguments.shots, arguments.captions, arguments.words)
        for each in arguments.models.split(","):
            clip = model(each, place)
            if arguments.accuracy:
                found[each] = accuracy(clip, material, method, arguments.seeds, device)
            elif arguments.throughput:
                batches = [int(batch) for batch in arguments.throughput.split(",")]
                found[each] = [throughput(clip, material, batch, arguments.peak_tflops, device) for batch in batches]
            else:
                plain_epochs = arguments.plain_epochs or arguments.epochs
                found[each] = speed(clip, material, method, plain_epochs, device)
    flat = [
        {"model": each} | row
        for each, rows in found.items()
        for row in (rows if isinstance(rows, list) else [{k: v for k, v in rows.items() if k != "frozen"}])
    ]
    print(table(list(flat[0]), [[_cell(value) for value in row.values()] for row in flat]))
    frozen = [
        [each, method_name, *row.values()]
        for each, rows in found.items()
        if isinstance(rows, dict)
        for method_name, row in rows.get("frozen", {}).items()
    ]
    if frozen:
        print("\n" + table(["model", "frozen method", "first_s", "cached_s", "times faster than ours_s"], frozen))
    setting = {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()}
    machine: dict[str, Any] = {"device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"}
    machine |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
    images = {"train": len(material.train.files), "val": len(material.val.files)}
    print(json.dumps({"benchmark": "training_speed", "setting": setting, **images, **machine, "results": found}))


def _cell(value: Any) -> Any:
    return "/".join(value.values()) if isinstance(value, dict) else value


if __name__ == "__main__":
    main()
