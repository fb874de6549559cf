"""docs/openapi/*.json are what the code serves, and the services' routes never overlap."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).resolve().parents[2] / "docs" / "openapi"


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", HERE / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_documents_are_current(generate: ModuleType) -> None:
    for name, document in generate.documents().items():
        committed = json.loads((HERE / f"{name}.json").read_text())
        assert committed == json.loads(json.dumps(document)), f"docs/openapi/{name}.json is stale: run `make openapi`"


def test_routes_never_overlap(generate: ModuleType) -> None:
    """One gateway, or one process, can serve all services."""
    shared_paths = {"/healthz", "/readyz", "/metrics"}
    seen: dict[str, str] = {}
    for name, document in generate.documents().items():
        for path in document["paths"].keys() - shared_paths:
            assert path not in seen, f"{path} is in {seen[path]} and {name}"
            seen[path] = name


def test_everything_under_v1_asks_for_a_key(generate: ModuleType) -> None:
    for document in generate.documents().values():
        for path, operations in document["paths"].items():
            for operation in operations.values():
                assert bool(operation.get("security")) == path.startswith("/v1"), path
