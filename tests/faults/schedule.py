"""What a seed means: which faults, when, for how long.

The same seed gives the same schedule, the same requests in each actor's order, and the same choices in each fault. It
does not give the same interleaving: how far a job is when a fault comes depends on the machine. So a seed that failed
is replayed several times (`--seed N --times 5`). Adding a fault changes what every seed means."""

import random
from dataclasses import dataclass

from tests.faults.inject import FAULTS

LOAD_SECONDS = (4.0, 6.0)
NUMBER = (1, 2, 2, 3, 3, 4)  # of faults; drawn from


@dataclass(frozen=True)
class Planned:
    name: str
    at: float  # seconds from the load's beginning
    lasts: float


@dataclass(frozen=True)
class Schedule:
    seed: int
    seconds: float  # of load
    faults: tuple[Planned, ...]

    def __str__(self) -> str:
        what = ", ".join(
            f"{f.name} at {f.at:.1f} s" + (f" for {f.lasts:.1f} s" if f.lasts else "") for f in self.faults
        )
        return f"seed {self.seed}: {self.seconds:.1f} s of load; {what}"


def schedule(seed: int, only: list[str] | None = None) -> Schedule:
    """Seeds that follow one another go through every fault in turn, in an order that each round draws anew; what comes
    beside is drawn freely. only: these faults, all of them."""
    rng = random.Random(f"schedule/{seed}")
    names = sorted(FAULTS)
    turn, place = divmod(seed, len(names))
    first = random.Random(f"round/{turn}").sample(names, len(names))[place]
    chosen = only or [first, *rng.choices(names, k=rng.choice(NUMBER) - 1)]
    seconds = rng.uniform(*LOAD_SECONDS)
    faults = []
    for name in chosen:
        lasts = rng.uniform(*FAULTS[name].seconds)
        faults.append(Planned(name, rng.uniform(0.3, seconds - 1.0), lasts))
    return Schedule(seed, seconds, tuple(sorted(faults, key=lambda fault: fault.at)))
