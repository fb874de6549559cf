"""docs/monitoring speaks of metrics that exist."""

import json
import re
from pathlib import Path

import pytest
import yaml
from prometheus_client import REGISTRY

import services.captioner.metrics
import shared.metrics

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "monitoring"
SUFFIXES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_count", "_sum", "_bucket")}
FROM_ELSEWHERE = {"process_resident_memory_bytes", "process_open_fds", "up"}  # prometheus_client's, Prometheus's


@pytest.fixture(scope="module")
def known() -> dict[str, set[str]]:
    """Every series of ours with its labels."""
    assert shared.metrics
    assert services.captioner.metrics
    found: dict[str, set[str]] = {}
    for collector in list(REGISTRY._collector_to_names):
        for metric in collector.describe() if hasattr(collector, "describe") else ():
            if metric.name.startswith("captune_"):
                labels = set(getattr(collector, "_labelnames", ()))
                for suffix in SUFFIXES[metric.type]:
                    found[metric.name + suffix] = labels | {"le"} if suffix == "_bucket" else labels
    return found


def expressions() -> list[str]:
    panels = json.loads((FOLDER / "grafana.json").read_text())["panels"]
    rules = [r for g in yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"] for r in g["rules"]]
    return [t["expr"] for panel in panels for t in panel["targets"]] + [rule["expr"] for rule in rules]


@pytest.mark.parametrize("expression", expressions())
def test_an_expression_names_series_and_labels_that_exist(expression: str, known: dict[str, set[str]]) -> None:
    names = set(re.findall(r"\b(?:captune|process|up)\w*\b(?=[{\[)\s>]|$)", expression)) - {"captune"}
    assert names, expression
    assert names <= known.keys() | FROM_ELSEWHERE
    labels = {label for name in names for label in known.get(name, {"job", "instance"})}
    for grouped in re.findall(r"by \(([^)]*)\)", expression):
        assert {label.strip() for label in grouped.split(",")} <= labels
    for selected in re.findall(r"{([^}]*)}", expression):
        assert set(re.findall(r"(\w+)\s*[=!]", selected)) <= labels


def test_every_alert_says_what_to_do() -> None:
    for group in yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"]:
        for rule in group["rules"]:
            assert {"summary", "action"} == rule["annotations"].keys()
            assert rule["labels"]["severity"] in ("page", "ticket")


def test_the_table_names_every_metric_of_ours(known: dict[str, set[str]]) -> None:
    table = (FOLDER / "README.md").read_text()
    for name, labels in known.items():
        if not name.startswith("captune_captioner_") and not name.endswith(("_sum", "_bucket")):
            line = next(line for line in table.splitlines() if f"`{name.removesuffix('_count')}`" in line)
            assert {each.strip() for each in line.split("|")[2].split(",")} == labels
