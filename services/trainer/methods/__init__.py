"""Every method by name. A new one is one file and one line here. Importing this costs no torch."""

from typing import Any

from services.trainer.methods.base import FineTune, Method, MethodHyperparameters
from services.trainer.methods.flyp import FLYP
from services.trainer.methods.mmft import MMFT
from services.trainer.methods.zero_shot import ZeroShot
from services.trainer.methods.zero_shot_ensemble import ZeroShotEnsemble
from shared.errors import InvalidInput

METHODS: dict[str, type[Method]] = {
    "mmft": MMFT,
    "flyp": FLYP,
    "zero_shot": ZeroShot,
    "zero_shot_ensemble": ZeroShotEnsemble,
}


def build(name: str, hyperparameters: dict[str, Any]) -> Method:
    """The method with checked hyperparameters. Raises InvalidInput on an unknown method or hyperparameter, a wrong type
    or a value out of range."""
    if name not in METHODS:
        raise InvalidInput(
            f"There is no method `{name}`. Choose one of: {', '.join(METHODS)}.",
            code="unknown_method",
            param="method.type",
        )
    method = METHODS[name]
    return method(method.parse(hyperparameters))


def describe() -> list[dict[str, Any]]:
    """What `GET /v1/fine_tuning/methods` lists: name, summary, needs_captions, trains and the JSON schema of the
    hyperparameters (defaults, ranges, units)."""
    return [
        {
            "name": name,
            "summary": method.summary,
            "needs_captions": method.needs_captions,
            "trains": method.trains,
            "hyperparameters": method.Hyperparameters.model_json_schema(),
        }
        for name, method in METHODS.items()
    ]


__all__ = ["METHODS", "FineTune", "Method", "MethodHyperparameters", "build", "describe"]
