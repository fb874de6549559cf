"""What importing a module may cost. API processes stay small: torch is loaded where a model is, and only then."""

import subprocess
import sys

import pytest

HEAVY = ("torch", "open_clip", "transformers", "timm", "bitsandbytes")


def modules_after(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={})
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "module",
    [
        "services.captioner.app",
        "services.trainer.app",
        "services.evaluator.app",
        "services.embedded.api",
        "services.embedded.stack",
        "shared.jobs.worker",
        "shared.jobs.reconciler",
        "shared.store.collector",
        "shared.db.migrate",
        "captune.cli",
    ],
)
def test_no_model_library_is_imported(module: str) -> None:
    # `env={}`: no setting is needed, so none is read, at import.
    assert not modules_after(f"import {module}") & set(HEAVY)


def test_the_client_needs_httpx_and_pydantic_only() -> None:
    loaded = modules_after("import captune")
    assert {"httpx", "pydantic"} <= loaded
    assert not loaded & {*HEAVY, "fastapi", "sqlalchemy", "redis", "rq", "numpy", "PIL", "alembic"}
