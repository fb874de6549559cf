"""Every method by name. A new one is one file and one line here. Importing this costs no torch."""

from typing import Any

from services.trainer.methods.base import FineTune, Fit, Frozen, Method, MethodHyperparameters
from services.trainer.methods.caption_prototypes import CaptionPrototypes
from services.trainer.methods.cross_entropy import CrossEntropy
from services.trainer.methods.flyp import FLYP
from services.trainer.methods.flyp_ensemble import FLYPEnsemble
from services.trainer.methods.gda import GDA
from services.trainer.methods.linear_probe import LinearProbe
from services.trainer.methods.lora import LoRA
from services.trainer.methods.lp_ft import LPFT
from services.trainer.methods.mmft import MMFT
from services.trainer.methods.prolip import ProLIP
from services.trainer.methods.tes import TeS
from services.trainer.methods.zero_shot import ZeroShot
from services.trainer.methods.zero_shot_ensemble import ZeroShotEnsemble
from shared.errors import InvalidInput

METHODS: dict[str, type[Method]] = {
    "mmft": MMFT,
    "flyp": FLYP,
    "flyp_ensemble": FLYPEnsemble,
    "cross_entropy": CrossEntropy,
    "lp_ft": LPFT,
    "lora": LoRA,
    "tes": TeS,
    "linear_probe": LinearProbe,
    "gda": GDA,
    "prolip": ProLIP,
    "caption_prototypes": CaptionPrototypes,
    "zero_shot": ZeroShot,
    "zero_shot_ensemble": ZeroShotEnsemble,
}
PRESETS = ("default", "paper")


def build(name: str, hyperparameters: dict[str, Any], preset: str = "default") -> Method:
    """The method with checked hyperparameters, those not given being the preset's. Raises InvalidInput on an unknown
    method, preset or hyperparameter, a wrong type or a value out of range."""
    if name not in METHODS:
        raise InvalidInput(
            f"There is no method `{name}`. Choose one of: {', '.join(METHODS)}.",
            code="unknown_method",
            param="method.type",
        )
    if preset not in PRESETS:
        raise InvalidInput(
            f"There is no preset `{preset}`. Choose one of: {', '.join(PRESETS)}.",
            code="unknown_preset",
            param="method.preset",
        )
    method = METHODS[name]
    return method(method.parse(hyperparameters, preset))


def describe() -> list[dict[str, Any]]:
    """What `GET /v1/fine_tuning/methods` lists: name, summary, source, kind, needs_captions, trains, presets (what they
    set otherwise than the schema's defaults) and the JSON schema of the hyperparameters (defaults, ranges, units)."""
    return [
        {
            "name": name,
            "summary": method.summary,
            "source": method.source,
            "kind": method.kind,
            "needs_captions": method.needs_captions,
            "trains": method.kind != "zero_shot",
            "presets": {preset: method.presets.get(preset, {}) for preset in PRESETS},
            "hyperparameters": method.Hyperparameters.model_json_schema(),
        }
        for name, method in METHODS.items()
    ]


__all__ = ["METHODS", "PRESETS", "FineTune", "Fit", "Frozen", "Method", "MethodHyperparameters", "build", "describe"]
