"""docker-compose.yml against the Compose specification, and everything it names against the code."""

import ast
import importlib
import json
import re
import subprocess
import sys
from fnmatch import fnmatchcase
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from fastapi import FastAPI
from jsonschema import Draft202012Validator
from pydantic_settings import BaseSettings

from services.captioner.settings import CaptionerSettings, CaptionWorkerSettings
from services.trainer.settings import TrainerSettings
from shared.config import CoreSettings
from shared.queue import KINDS
from shared.store.collector import CollectorSettings
from shared.web import health

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docker-compose.yml").read_text("utf-8")
COMPOSE = yaml.safe_load(TEXT)
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = {name: service for name, service in SERVICES.items() if "build" in service}
APIS = {"captioner", "trainer", "evaluator"}
SETTINGS: tuple[type[BaseSettings], ...] = (
    CollectorSettings,
    CaptionerSettings,
    CaptionWorkerSettings,
    TrainerSettings,
)
FOREIGN = {  # read by libraries we use
    *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL", "HF_TOKEN", "FORWARDED_ALLOW_IPS")
}


class OverrideLoader(yaml.SafeLoader):
    """With `!override`, a tag that Compose adds to YAML for files laid over others."""


def _override(loader: OverrideLoader, node: yaml.SequenceNode) -> list[Any]:
    return list(loader.construct_sequence(node))


OverrideLoader.add_constructor("!override", _override)
OVERRIDE = yaml.load((ROOT / "docker/check/compose.yml").read_text("utf-8"), OverrideLoader)
GPU = yaml.safe_load((ROOT / "docker-compose.gpu.yml").read_text("utf-8"))


def environment_names() -> set[str]:
    names = set()
    for settings in SETTINGS:
        for name, field in settings.model_fields.items():
            alias = field.validation_alias
            prefixed = f"{settings.model_config.get('env_prefix', '')}{name}".upper()
            names.add(prefixed if alias is None else str(alias.choices[0]))  # type: ignore[union-attr]
    return names


def seconds(duration: str) -> int:
    return int(duration[:-1]) * {"s": 1, "m": 60}[duration[-1]]


def tree(module: str) -> ast.Module:
    spec = find_spec(module)
    assert spec is not None, f"no module {module}"
    assert spec.origin is not None, f"{module} is a package without code"
    return ast.parse(Path(spec.origin).read_text("utf-8"))


def api_paths(service: str) -> set[str]:
    app = FastAPI()
    for router in importlib.import_module(f"services.{service}.app").ROUTERS:
        app.include_router(router)
    return set(app.openapi()["paths"])


@pytest.mark.parametrize("document", [COMPOSE, GPU, OVERRIDE], ids=["base", "gpu", "check"])
def test_the_file_follows_the_compose_specification(document: dict[str, Any]) -> None:
    vendored = files("check_jsonschema").joinpath("builtin_schemas/vendor/compose-spec.json")
    schema = json.loads(vendored.read_text("utf-8"))
    assert [f"{error.json_path}: {error.message}" for error in Draft202012Validator(schema).iter_errors(document)] == []


def test_every_process_of_the_design_is_there() -> None:
    assert set(SERVICES) == APIS | {
        *("postgres", "redis", "migrate", "gateway", "reconciler", "collector"),
        *("ingest-worker", "caption-worker", "trainer-worker", "evaluator-worker"),
    }
    assert set(OVERRIDE["services"]) <= set(SERVICES)


def test_every_queue_has_a_worker_and_every_worker_a_queue() -> None:
    module = ["python", "-m", "shared.jobs.worker"]
    assert sorted(s["command"][3] for s in OURS.values() if s["command"][:3] == module) == sorted(KINDS)


@pytest.mark.parametrize("name", OURS)
def test_the_command_names_code_that_exists(name: str) -> None:
    match OURS[name]["command"]:
        case ["python", "-m", "shared.web.serve", target, "--host", "0.0.0.0", "--grace", "20"]:
            module, _, factory = target.partition(":")
            found = [n for n in tree(module).body if isinstance(n, ast.FunctionDef) and n.name == factory]
            assert len(found) == 1
            assert not found[0].args.args, "it is called without arguments"
            assert module == f"services.{name}.app"
            assert seconds(OURS[name]["stop_grace_period"]) > 20
        case ["python", "-m", module, *_]:
            assert any(isinstance(n, ast.If) and "__main__" in ast.unparse(n.test) for n in tree(module).body)
        case command:
            pytest.fail(f"unknown command {command}")


@pytest.mark.parametrize("name", OURS)
def test_every_variable_is_a_setting_and_every_required_setting_is_given(name: str) -> None:
    given = set(OURS[name]["environment"])
    assert given - environment_names() - FOREIGN == set()
    assert given >= {"DATABASE_URL", "REDIS_URL", "STORAGE_URL"}


def test_the_caption_worker_can_reach_the_captioner_with_a_token_it_knows() -> None:
    worker, captioner = SERVICES["caption-worker"]["environment"], SERVICES["captioner"]["environment"]
    required = {f"CAPTUNE_{n.upper()}" for n, f in CaptionWorkerSettings.model_fields.items() if f.is_required()}
    assert required <= set(worker)
    assert worker["CAPTUNE_CAPTIONER_URL"] == "http://captioner:8000"
    assert worker["CAPTUNE_SERVICE_TOKEN"] == captioner["CAPTUNE_SERVICE_TOKEN"]
    assert set(SERVICES["captioner"]["networks"]) & set(SERVICES["caption-worker"]["networks"])


@pytest.mark.parametrize("name", sorted(APIS))
def test_the_healthcheck_asks_a_path_and_port_that_are_served(name: str) -> None:
    command = SERVICES[name]["healthcheck"]["test"]
    assert command[:2] == ["CMD", "python"]
    script = Path(command[2])
    assert (ROOT / script.relative_to("/app")).is_file()
    assert f"COPY {script.relative_to('/app')} " in (ROOT / "docker/Dockerfile").read_text("utf-8")
    path = command[3].removeprefix("http://127.0.0.1:8000")
    assert path in {route.path for route in health.router.routes}  # type: ignore[attr-defined]


def test_only_the_gateway_publishes_a_port_and_it_listens_there() -> None:
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert list(published) == ["gateway"]
    assert [port.rpartition(":")[2] for port in published["gateway"]] == ["8080"]
    caddyfile = (ROOT / "docker/Caddyfile").read_text("utf-8")
    assert "\n:8080 {" in caddyfile
    assert SERVICES["gateway"]["healthcheck"]["test"][-1] == "http://127.0.0.1:8080/healthz"
    assert "handle /healthz" in caddyfile
    assert set(re.findall(r"reverse_proxy (\S+)", caddyfile)) == {f"{name}:8000" for name in APIS}


@pytest.mark.parametrize("name", sorted(APIS))
def test_the_gateway_sends_every_route_to_the_service_that_has_it(name: str) -> None:
    caddyfile = (ROOT / "docker/Caddyfile").read_text("utf-8")
    matchers = {m: patterns.split() for m, patterns in re.findall(r"@(\w+) path (.+)", caddyfile)}
    handlers = re.findall(r"handle @(\w+) \{\s*reverse_proxy (\w+):8000", caddyfile)
    assert [matcher for matcher, _ in handlers] == list(matchers)
    paths = api_paths(name)
    assert paths
    for path in paths:
        concrete = re.sub(r"\{[^}]+\}", "x1", path)
        target = next((t for m, t in handlers if any(fnmatchcase(concrete, p) for p in matchers[m])), None)
        assert target == name, f"{path} goes to {target}"


def test_database_and_queue_are_out_of_the_gateways_reach() -> None:
    assert COMPOSE["networks"]["data"]["internal"] is True
    for name in ("postgres", "redis"):
        assert SERVICES[name]["networks"] == ["data"]
    assert SERVICES["gateway"]["networks"] == ["web"]


def test_the_queue_keeps_what_it_acknowledged() -> None:
    command = SERVICES["redis"]["command"][-1]
    assert "--appendonly yes" in command
    assert "--maxmemory-policy noeviction" in command
    assert "redis:/data" in SERVICES["redis"]["volumes"]


@pytest.mark.parametrize("name", SERVICES)
def test_every_process_runs_without_privileges_and_has_time_to_stop(name: str) -> None:
    service = SERVICES[name]
    assert str(service["user"]).partition(":")[0] not in ("0", "root")
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["restart"] == ("no" if name == "migrate" else "unless-stopped")
    assert re.fullmatch(r"\d+[sm]", service["stop_grace_period"])
    if not name.endswith("worker") and name not in ("migrate", "reconciler", "collector"):
        assert "test" in service["healthcheck"]


def test_a_training_run_has_longest_to_save_itself() -> None:
    periods = {name: seconds(service["stop_grace_period"]) for name, service in OURS.items()}
    assert max(periods, key=lambda name: periods[name]) == "trainer-worker"
    assert periods["trainer-worker"] >= 120


def test_a_gpu_is_reserved_where_a_model_runs_and_only_by_the_file_that_is_laid_over() -> None:
    assert not [name for name, service in SERVICES.items() if "deploy" in service]
    assert set(GPU["services"]) == {"captioner", "trainer-worker"}
    for service in GPU["services"].values():
        (device,) = service["deploy"]["resources"]["reservations"]["devices"]
        assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])
    example = (ROOT / "docker/.env.example").read_text("utf-8")
    assert "COMPOSE_FILE=docker-compose.yml:docker-compose.gpu.yml" in example


def test_local_models_are_read_below_a_folder_that_no_container_writes() -> None:
    for service in OURS.values():
        assert service["environment"]["CAPTUNE_MODEL_ROOTS"] == "/local-models"
        assert "./local-models:/local-models:ro" in service["volumes"]


def test_what_the_docs_offer_as_settings_is_passed_on_to_whom_it_concerns() -> None:
    """A value in .env that reaches nobody is ignored without a word."""
    pages = "".join((ROOT / page).read_text("utf-8") for page in ("README.md", "SECURITY.md", "docs/operations.md"))
    offered = set(re.findall(r"\bCAPTUNE_[A-Z_]+\b", pages)) - {"CAPTUNE_SERVICE_TOKEN"}  # for two services alone
    concerned: dict[type[BaseSettings], set[str]] = {
        CoreSettings: set(OURS),
        CollectorSettings: {"collector"},
        CaptionerSettings: {"captioner"},
        CaptionWorkerSettings: {"caption-worker"},
        TrainerSettings: {"trainer-worker"},
    }
    for settings, services in concerned.items():
        settable = {f"CAPTUNE_{name}".upper() for name in settings.model_fields} & offered
        assert settable
        for name in services:
            assert settable - set(OURS[name]["environment"]) == set(), name


def test_the_gateway_tells_the_apis_one_address_and_believes_named_proxies_only() -> None:
    caddyfile = (ROOT / "docker/Caddyfile").read_text("utf-8")
    assert "\ttrusted_proxies static {$CAPTUNE_TRUSTED_PROXIES}\n" in caddyfile
    assert "\ttrusted_proxies_strict\n" in caddyfile
    assert "\trequest_header X-Forwarded-For {client_ip}\n" in caddyfile
    assert SERVICES["gateway"]["environment"]["CAPTUNE_TRUSTED_PROXIES"] is None


def test_nothing_but_the_migration_starts_on_an_unmigrated_database() -> None:
    for name, service in OURS.items():
        if name != "migrate":
            assert service["depends_on"]["migrate"] == {"condition": "service_completed_successfully"}
    for service in SERVICES.values():
        for dependency, how in service.get("depends_on", {}).items():
            assert dependency in SERVICES
            assert how["condition"] != "service_healthy" or "healthcheck" in SERVICES[dependency]


def test_every_variable_to_fill_in_is_in_the_example_and_secrets_have_no_default() -> None:
    example = (ROOT / "docker/.env.example").read_text("utf-8")
    offered = set(re.findall(r"^#?([A-Z_]+)=", example, re.MULTILINE))
    environments = [service["environment"].items() for service in SERVICES.values() if "environment" in service]
    passed_on = {name for environment in environments for name, value in environment if value is None}
    assert set(re.findall(r"\$\{([A-Z_]+)", TEXT)) | passed_on | {"COMPOSE_FILE"} == offered
    for secret in ("POSTGRES_PASSWORD", "REDIS_PASSWORD", "CAPTUNE_SERVICE_TOKEN", "CAPTUNE_BOOTSTRAP_KEY"):
        assert set(re.findall(rf"\$\{{{secret}(.)(.)", TEXT)) == {(":", "?")}
        assert re.search(rf"^{secret}=$", example, re.MULTILINE)


def test_the_image_has_all_it_copies_and_runs_as_the_user_compose_names() -> None:
    dockerfile = (ROOT / "docker/Dockerfile").read_text("utf-8")
    ignored = (ROOT / "docker/Dockerfile.dockerignore").read_text("utf-8").splitlines()
    assert "ARG BASE_IMAGE=python:3.11-slim" in dockerfile
    for sources in re.findall(r"^COPY (?!--from)(.+) \S+$", dockerfile, re.MULTILINE):
        for source in sources.split():
            assert (ROOT / source).exists(), source
            assert f"!{source}" in ignored, f"{source} does not reach the build"
    uid = re.search(r"useradd --uid (\d+)", dockerfile)
    assert uid is not None
    assert {service["user"] for service in OURS.values()} == {f"{uid[1]}:{uid[1]}"}
    owned = re.search(r"install -d -o captune -g captune (.+?) \\?\n", dockerfile)
    assert owned is not None
    mounted = {volume.partition(":")[2] for service in OURS.values() for volume in service["volumes"]}
    assert {*owned[1].split(), "/local-models:ro"} == mounted
    assert "&& mkdir /local-models " in dockerfile, "not the processes' own"
    used = {volume.partition(":")[0] for service in SERVICES.values() for volume in service["volumes"]}
    assert used - set(COMPOSE["volumes"]) == {"./docker/Caddyfile", "./local-models"}
    assert used >= set(COMPOSE["volumes"])


def test_the_image_installs_the_extras_of_all_services() -> None:
    command = re.search(r"pyproject\.toml ([a-z0-9 ]+) >", (ROOT / "docker/Dockerfile").read_text("utf-8"))
    assert command is not None
    script = [sys.executable, ROOT / "docker/requirements.py", ROOT / "pyproject.toml", *command[1].split()]
    listed = subprocess.run(script, capture_output=True, text=True, check=True).stdout.splitlines()
    names = {re.split(r"[^A-Za-z0-9_.-]", line)[0].lower() for line in listed}
    assert names >= {"setuptools", "fastapi", "uvicorn", "sqlalchemy", "alembic", "psycopg", "rq", "torch", "s3fs"}
