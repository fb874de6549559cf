"""Engines by name. Importing this costs nothing: an engine's module is imported when it is built."""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from services.captioner.engines.base import Engine
from services.captioner.settings import EngineSpec
from shared.errors import InvalidInput

#: type name -> "module:class"
ENGINES: dict[str, str] = {
    "attributes": "services.captioner.engines.attributes:AttributesEngine",
    "hf": "services.captioner.engines.hf:HFEngine",
    "openai": "services.captioner.engines.openai:OpenAIEngine",
}


def build(name: str, spec: EngineSpec, model_roots: Sequence[Path] = ()) -> Engine:
    """The engine configured under ``name``, not yet loaded; local models are read below ``model_roots`` only. Raises
    ``InvalidInput`` for an unknown type."""
    if spec.type not in ENGINES:
        raise InvalidInput(
            f"Engine {name!r} has type {spec.type!r}, which does not exist. "
            f"Choose one of: {', '.join(sorted(ENGINES))}.",
            code="unknown_engine_type",
            param=f"engines.{name}.type",
        )
    module, _, attribute = ENGINES[spec.type].partition(":")
    engine_class: type[Engine] = getattr(import_module(module), attribute)
    return engine_class(spec, name, model_roots)
