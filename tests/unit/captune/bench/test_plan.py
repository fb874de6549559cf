"""Which caption jobs and which runs: checked against the server's own rules."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from captune.bench.data import Entry, Reading
from captune.bench.plan import FULL, METHODS, Plan, Settings, count_captions, count_runs, plan
from services.trainer import methods
from services.trainer.routes.submission import identity, normalised
from shared.datasets.splits import few_shot
from shared.schemas.fine_tuning import FineTuningRequest, Method

KNOWN = [Method(**each) for each in methods.describe()]
READS = {method.name for method in KNOWN if method.needs_captions}

some_settings = st.builds(
    Settings,
    model=st.just("starter"),
    methods=st.lists(st.sampled_from([m.name for m in KNOWN]), min_size=1, max_size=5, unique=True).map(tuple),
    shots=st.lists(st.sampled_from([1, 2, 4, FULL]), min_size=1, unique=True).map(tuple),
    seeds=st.integers(1, 3),
    validation=st.sampled_from(["none", "few_shot", "full"]),
)


def expanded(chosen: Plan, settings: Settings) -> dict[str, FineTuningRequest]:
    """What the server makes of the requests: each with each, what a method does not use left out, each once."""
    ids = [f"cap_{index}" for index in range(len(chosen.captions))]
    found: dict[str, FineTuningRequest] = {}
    for step in chosen.runs:
        body = step.request(settings, ids, "tag")
        assert body.shot_seeds is None
        for spec in body.methods:
            method = methods.build(spec.type, spec.hyperparameters, spec.preset)
            assert method.needs_captions == bool(body.caption_job_ids)
            for shots in body.shots:
                for seed in body.seeds:
                    run = FineTuningRequest(
                        model=body.models[0],
                        dataset_id="ds_1",
                        caption_job_id=body.caption_job_ids[0] if body.caption_job_ids else None,
                        method=spec,
                        shots=shots,
                        shot_seed=seed,
                        seed=seed,
                        validation=body.validation,
                    )
                    assert body.validation != "few_shot" or shots is not None  # the server refuses it
                    run = normalised(run, method)
                    found[identity(run.model_dump(mode="json"))] = run
    return found


@given(some_settings)
def test_the_number_of_runs_is_what_the_server_makes(settings: Settings) -> None:
    assert len(expanded(plan(settings, KNOWN), settings)) == count_runs(settings, KNOWN)


@given(some_settings)
def test_every_run_reads_captions_of_its_own_images(settings: Settings) -> None:
    chosen = plan(settings, KNOWN)
    images = {name: [f"{name}/{n}" for n in range(10)] for name in ("cat", "dog")}
    everything = {path for paths in images.values() for path in paths}
    for run in expanded(chosen, settings).values():
        if run.method.type not in READS:
            assert run.caption_job_id is None
            continue
        step = chosen.captions[int(str(run.caption_job_id).removeprefix("cap_"))]
        captioned = everything if step.shots is None else set(few_shot(images, step.shots, step.shot_seed)[0])
        used = everything if run.shots is None else set(few_shot(images, run.shots, run.shot_seed)[0])
        assert used <= captioned


@given(some_settings)
def test_every_method_runs_at_all_shots_and_seeds(settings: Settings) -> None:
    runs = list(expanded(plan(settings, KNOWN), settings).values())
    for method in KNOWN:
        mine = {(run.shots, run.seed) for run in runs if run.method.type == method.name}
        if method.name in settings.methods and method.kind == "fine_tune":
            assert mine == {(shots, seed) for shots in settings.shots for seed in range(settings.seeds)}
        assert bool(mine) == (method.name in settings.methods)


def test_no_method_reads_so_nothing_is_captioned() -> None:
    settings = Settings(model="starter", methods=("flyp", "zero_shot"))
    chosen = plan(settings, KNOWN)
    assert chosen.captions == []
    assert count_captions(chosen, settings, Reading(root=None)) == 0  # type: ignore[arg-type]


def test_the_paper_protocol_captions_train_once() -> None:
    chosen = plan(Settings(model="starter"), KNOWN)
    assert [(step.shots, step.shot_seed) for step in chosen.captions] == [(None, 0)]
    assert {(step.shots, step.validation) for step in chosen.runs} == {
        ((1, 2, 4, 8, 16), "few_shot"),
        ((None,), "full"),
    }
    assert count_runs(Settings(model="starter"), KNOWN) == 5 * 6 * 5 + (5 * 5 + 1) + 2


def test_few_shot_alone_captions_a_draw_per_seed() -> None:
    settings = Settings(model="ViT-B-32/openai", shots=(1, 4), seeds=3, engine="qwen")
    chosen = plan(settings, KNOWN)
    requests = [step.request(settings, "ds_1", "textures") for step in chosen.captions]
    assert [(r.shots, r.shot_seed) for r in requests] == [(4, 0), (4, 1), (4, 2)]
    assert {(r.engine, r.clip_model, r.domain, r.split) for r in requests} == {
        ("qwen", "ViT-B-32/openai", "textures", "train")
    }
    entries = [Entry(f"{n}", label, "train") for n, label in enumerate(["cat"] * 9 + ["dog"] * 2)]
    assert count_captions(chosen, settings, Reading(None, entries)) == 3 * 3 * (4 + 2)  # type: ignore[arg-type]


def test_an_unknown_method_is_named() -> None:
    with pytest.raises(ValueError, match="no method nonsense; it has mmft"):
        plan(Settings(model="starter", methods=("mmft", "nonsense")), KNOWN)


def test_the_default_methods_are_the_servers() -> None:
    assert set(METHODS) <= {method.name for method in KNOWN}
