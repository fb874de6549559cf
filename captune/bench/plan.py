"""What the protocol asks the server for, before anything is asked: which caption jobs, which runs. Pure."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from captune.bench.data import Reading
from shared.schemas.captions import CaptionJobRequest
from shared.schemas.fine_tuning import GroupRequest, GroupRuns, Method, MethodSpec, Validation

FULL: Final = None  # as `shots`: all of train
# MMFT and what must stand beside it.
METHODS: Final = (
    "mmft", "flyp", "flyp_ensemble", "cross_entropy", "lp_ft", "linear_probe", "zero_shot", "zero_shot_ensemble",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Settings:
    """`shots`: train images per class, None for all. Seed s draws the shots and trains, for s below `seeds`.
    `preset`: whose hyperparameters, the papers' or ours."""

    model: str
    methods: tuple[str, ...] = METHODS
    shots: tuple[int | None, ...] = (1, 2, 4, 8, 16, FULL)
    seeds: int = 5
    engine: str = "attributes"
    validation: Validation = "few_shot"
    preset: str = "paper"
    characteristics: tuple[str, ...] = ("visual", "shape", "texture")

    @property
    def few(self) -> list[int]:
        return [shots for shots in self.shots if shots is not None]


@dataclass(frozen=True, slots=True)
class CaptionStep:
    """One caption job: all of train, or the largest few-shot subset of a seed (the smaller ones are in it)."""

    shots: int | None
    shot_seed: int

    def request(self, settings: Settings, dataset_id: str, domain: str) -> CaptionJobRequest:
        return CaptionJobRequest.model_validate(
            {
                "dataset_id": dataset_id,
                "domain": domain,
                "engine": settings.engine,
                "characteristics": list(settings.characteristics),
                "shots": self.shots,
                "shot_seed": self.shot_seed,
                "clip_model": settings.model,
            }
        )

    def images(self, train: Mapping[str, int]) -> int:
        """How many it captions, of so many train images by class."""
        return sum(count if self.shots is None else min(count, self.shots) for count in train.values())


@dataclass(frozen=True, slots=True)
class RunStep:
    """Runs that share their caption job (an index into Plan.captions) and their validation."""

    caption: int | None
    methods: tuple[str, ...]
    shots: tuple[int | None, ...]
    seeds: tuple[int, ...]
    validation: Validation

    def request(self, settings: Settings, caption_job_ids: Sequence[str], tag: str) -> GroupRuns:
        return GroupRuns.model_validate(
            {
                "models": [settings.model],
                "methods": [MethodSpec.model_validate({"type": m, "preset": settings.preset}) for m in self.methods],
                "caption_job_ids": [] if self.caption is None else [caption_job_ids[self.caption]],
                "shots": list(self.shots),
                "seeds": list(self.seeds),
                "validation": self.validation,
                "tags": [tag],
            }
        )


@dataclass(frozen=True, slots=True)
class Plan:
    captions: list[CaptionStep]
    runs: list[RunStep]


def plan(settings: Settings, known: Iterable[Method]) -> Plan:
    """Where all of train is captioned anyway, the few-shot runs read from that job; else each seed has its own, as each
    draws other images. Validation 'few_shot' cannot be had with all of train: those runs validate on all of val.

    Raises ValueError for a method that the server does not have."""
    methods = {method.name: method for method in known}
    if unknown := [name for name in settings.methods if name not in methods]:
        raise ValueError(f"the server has no method {', '.join(unknown)}; it has {', '.join(methods)}")
    readers = tuple(name for name in settings.methods if methods[name].needs_captions)
    others = tuple(name for name in settings.methods if name not in readers)
    seeds = tuple(range(settings.seeds))
    captions: list[CaptionStep] = []
    sources: list[tuple[int, tuple[int, ...]]] = []  # (caption job, seeds that read from it)
    if readers:
        whole = FULL in settings.shots
        captions = [CaptionStep(FULL, 0)] if whole else [CaptionStep(max(settings.few), seed) for seed in seeds]
        sources = [(0, seeds)] if whole else [(index, (seed,)) for index, seed in enumerate(seeds)]
    runs = []
    for shots, validation in _by_validation(settings):
        if others:
            runs.append(RunStep(None, others, shots, seeds, validation))
        runs += [RunStep(index, readers, shots, mine, validation) for index, mine in sources]
    return Plan(captions, runs)


def _by_validation(settings: Settings) -> list[tuple[tuple[int | None, ...], Validation]]:
    if settings.validation != "few_shot" or FULL not in settings.shots or not settings.few:
        alone: Validation = "full" if settings.validation == "few_shot" and not settings.few else settings.validation
        return [(settings.shots, alone)]
    return [(tuple(settings.few), "few_shot"), ((FULL,), "full")]


def count_runs(settings: Settings, known: Iterable[Method]) -> int:
    """As the server multiplies them out: only fine-tunes draw anything but the shots, so other methods run once on all
    of train, and a zero-shot method without captions once at all."""
    methods = {method.name: method for method in known}
    total = 0
    for name in settings.methods:
        if methods[name].kind == "fine_tune":
            total += len(settings.shots) * settings.seeds
        elif methods[name].kind == "zero_shot" and not methods[name].needs_captions:
            total += 1
        else:
            total += len(settings.few) * settings.seeds + (FULL in settings.shots)
    return total


def count_captions(chosen: Plan, settings: Settings, reading: Reading) -> int:
    """At most so many; images that two seeds draw are captioned once."""
    train = reading.counts()["train"]
    return len(settings.characteristics) * sum(step.images(train) for step in chosen.captions)


def group_request(runs: GroupRuns, dataset_id: str, name: str) -> GroupRequest:
    return GroupRequest(**runs.model_dump(), dataset_id=dataset_id, name=name)
