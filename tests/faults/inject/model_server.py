"""What somebody else's model server does to those who ask it for captions."""

import random
from typing import TYPE_CHECKING

from tests.faults.inject.base import End, Fault
from tests.openai_server import Behaviour, after, cut, drop, echo, html, ok, raw, status

if TYPE_CHECKING:
    from tests.faults.world import World

HANG = 30.0  # seconds; longer than anybody waits

BEHAVIOURS: dict[str, Behaviour] = {
    "429": status(429, "slow down"),
    "429_retry_after": status(429, "slow down", Retry_After="1"),
    "500": status(500, "internal error"),
    "503": status(503, "loading"),
    "hang": after(HANG),
    "slow": after(1.0, echo),
    "garbage": raw(b'{"choices": [{"message": '),
    "not_json": raw(b"\xff\xfe\x00"),
    "html": html,
    "no_choices": ok(choices=0),
    "cut": cut,
    "drop": drop,
    "empty": ok(text=""),
    "blank": ok(text=" \n\t "),
    "null": ok(message={"role": "assistant", "content": None}),
}


def misbehave(name: str, behaviour: Behaviour) -> Fault:
    def begin(world: "World", rng: random.Random) -> End:
        world.models.behave(behaviour)
        return lambda: world.models.behave(None)

    return Fault(f"model_server_{name}", "model_server", (0.5, 4.0), begin)


def _gone(world: "World", rng: random.Random) -> End:
    world.models.stop()
    return world.models.start


FAULTS = [
    *(misbehave(name, behaviour) for name, behaviour in BEHAVIOURS.items()),
    Fault("model_server_gone", "model_server", (0.5, 4.0), _gone),
]
