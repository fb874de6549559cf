"""The paper's protocol against a running server: everything is done once, however often it is asked for."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from captune import Client
from captune.bench import READERS, read
from captune.bench.plan import Settings
from captune.bench.protocol import Protocol
from captune.bench.results import Result
from shared.schemas.datasets import Dataset
from tests.unit.captune.bench.layouts import BUILD


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bench")
    BUILD["dtd"](path)
    return path


def run(client: Client, folder: Path, settings: Settings) -> Result:
    protocol = Protocol(client, settings, lambda text: None)
    return protocol.collect(protocol.submit("dtd", READERS["dtd"], read("dtd", folder, 0)), READERS["dtd"])


def test_running_it_twice_does_nothing_twice(client: Client, models: Path, folder: Path) -> None:
    methods = ("linear_probe", "caption_prototypes", "zero_shot")  # quick ones; the protocol is the same for all
    settings = Settings(str(models / "clip"), methods, shots=(1, 2), seeds=2, preset="default")
    first = run(client, folder, settings)
    assert first.error is None
    dataset = client.job(str(first.dataset_id))
    assert isinstance(dataset, Dataset)
    assert dataset.counts == read("dtd", folder, 0).counts()
    assert (dataset.domain, [c.name for c in dataset.classes or []]) == (
        "textures",
        ["banded", "chequered", "zigzagged"],
    )
    assert {(row.method, row.shots): row.runs for row in first.rows} == {
        **{(method, shots): 2 for method in methods[:2] for shots in (1, 2)},
        ("zero_shot", None): 1,
    }
    assert all(row.mean is not None and 0 <= row.mean <= 100 and row.missing == 0 for row in first.rows)

    before = jobs(client, dataset.id)
    assert before["cap"] == 2  # a few-shot draw for each seed
    assert run(client, folder, settings) == first
    assert jobs(client, dataset.id) == before

    wider = run(client, folder, replace(settings, shots=(1, 2, None)))
    assert {(row.method, row.shots): row.runs for row in wider.rows} == {
        **{(method, shots): 2 for method in methods[:2] for shots in (1, 2)},
        **{(method, None): 1 for method in methods},  # of which nothing is drawn
    }
    assert (wider.dataset_id, wider.group_id) == (first.dataset_id, first.group_id)
    assert jobs(client, dataset.id)["cap"] == 3  # all of train, from which all runs then read
    assert [row.mean for row in wider.rows if row.method == "linear_probe" and row.shots] == [
        row.mean for row in first.rows if row.method == "linear_probe"
    ]


def jobs(client: Client, dataset_id: str) -> Counter[str]:
    found = Counter({kind: len(list(client.jobs(kind, dataset_id=dataset_id))) for kind in ("cap", "ft", "eval")})
    found["ds"] = sum(dataset.name == "dtd" for dataset in client.datasets())
    return found


def test_a_captioner_that_is_not_there_is_told(client: Client, models: Path, folder: Path) -> None:
    settings = Settings(str(models / "clip"), ("mmft",), shots=(1,), seeds=1, engine="nobody")
    result = run(client, folder, settings)
    assert result.rows == []
    assert "nobody" in str(result.error)
