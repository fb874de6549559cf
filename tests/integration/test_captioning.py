"""The caption job, whole: real database, real store, a real HTTP server in the captioner's place."""

import threading
import time
from collections import Counter

import pytest

from shared.core import Core
from shared.datasets.lookup import draw_shots, split_images
from tests.integration.caption_jobs import (
    SENTENCE,
    Gate,
    caption_all,
    captions_of,
    counted,
    done,
    images_of,
    in_thread,
    run,
    submit,
)
from tests.integration.captioner_server import Answer, Asked, CaptionerServer
from tests.integration.factories import add_dataset, read_job
from tests.integration.support import wait_for


def test_every_image_gets_a_caption_per_characteristic(core: Core, server: CaptionerServer) -> None:
    job_id = submit(core, add_dataset(core, images=3), words=20, temperature=0.5, seed=4)
    result = done(core, job_id)
    assert counted(result, "images", "captions", "written", "reused", "failed") == (6, 12, 12, 0, 0)
    assert result["captioner"] == {"engine": "m", "revision": "r1", "precision": "nf4"}
    assert server.calls == 12
    row = captions_of(core, job_id)[0]
    assert row.text
    assert 0 < row.clip_tokens < 77
    found = row.provenance
    assert found["prompt"].startswith("To differentiate this")
    assert found["prompt"].endswith("in 20 words.")
    assert {name: found[name] for name in ("engine", "revision", "precision", "temperature", "seed", "max_tokens")} == {
        "engine": "m",
        "revision": "r1",
        "precision": "nf4",
        "temperature": 0.5,
        "seed": 4,
        "max_tokens": 60,
    }
    assert (found["job_id"], found["attempt"], found["finish_reason"], found["words"]) == (job_id, 1, "stop", 20)
    assert (found["prompt_tokens"], found["completion_tokens"], found["reasks"], found["trimmed"]) == (7, 3, 0, False)
    assert found["milliseconds"] > 0
    assert found["raw"] == f"a {row.characteristic} of a " + found["raw"].split(" of a ")[1]


def test_display_names_and_templates_reach_the_prompt(core: Core, server: CaptionerServer) -> None:
    classes = [{"name": "cat", "display_name": "Felis {domain}"}, {"name": "dog", "display_name": "house dog"}]
    template = {"name": "gaze", "template": 'The {characteristic} of {class_name}, as {"json": 1}, {words} words.'}
    caption_all(core, add_dataset(core, images=1, classes=classes), characteristics=[template], words=9)
    assert {asked.prompt for asked in server.asked} == {
        'The gaze of Felis {domain}, as {"json": 1}, 9 words.',
        'The gaze of house dog, as {"json": 1}, 9 words.',
    }
    assert {asked.class_name for asked in server.asked} == {"Felis {domain}", "house dog"}


def test_samples_are_asked_for_with_seeds_counted_up(core: Core, server: CaptionerServer) -> None:
    job_id = caption_all(core, add_dataset(core, images=1), characteristics=["visual"], samples_per_prompt=3, seed=7)
    assert Counter(asked.body["seed"] for asked in server.asked) == {7: 2, 8: 2, 9: 2}
    rows = captions_of(core, job_id)
    assert len({row.key for row in rows if row.image_id == rows[0].image_id}) == 3
    more = submit(core, rows[0].dataset_id, characteristics=["visual"], samples_per_prompt=5, seed=7)
    assert counted(done(core, more), "written", "reused") == (4, 6), "more samples keep those that are there"


def test_shots_are_those_that_training_draws(core: Core, server: CaptionerServer) -> None:
    dataset_id = add_dataset(core, images=9)
    job_id = caption_all(core, dataset_id, shots=2, shot_seed=5)
    with core.transaction() as session:
        drawn, _ = draw_shots(split_images(session, dataset_id, "train"), 2, 5)
    assert {row.image_id for row in captions_of(core, job_id)} == {image.id for image in drawn}
    assert len(drawn) == 4


@pytest.mark.parametrize(("limit", "shots"), [(6, None), (5, None), (6, 4)])
def test_a_limit_takes_the_classes_evenly(core: Core, server: CaptionerServer, limit: int, shots: int | None) -> None:
    dataset_id = add_dataset(core, images=9)
    job_id = submit(core, dataset_id, limit=limit, shots=shots)
    assert done(core, job_id)["images"] == limit
    images = images_of(core, dataset_id)
    chosen = {row.image_id for row in captions_of(core, job_id)}
    by_class = Counter(images[id].class_name for id in chosen)
    assert by_class.total() == limit
    assert max(by_class.values()) - min(by_class.values()) <= 1
    if shots is not None:
        with core.transaction() as session:
            drawn, _ = draw_shots(split_images(session, dataset_id, "train"), shots, 0)
        assert chosen <= {image.id for image in drawn}


def test_an_empty_split_is_an_error(core: Core, server: CaptionerServer) -> None:
    job = run(core, submit(core, add_dataset(core, images=1), split="val"))
    assert (job.status, job.error and job.error["code"]) == ("failed", "empty_split")


def test_a_refused_image_is_reported_and_the_others_go_on(core: Core, server: CaptionerServer) -> None:
    server.answer = lambda asked: Answer(status=422) if asked.class_name == "dog" else Answer("a soft coat")
    result = done(core, submit(core, add_dataset(core, images=2)))
    assert counted(result, "images", "captions", "failed") == (4, 4, 4)
    assert {failure["path"] for failure in result["failures"]} == {"dog/1.png", "dog/3.png"}
    assert {failure["code"] for failure in result["failures"]} == {"why"}
    assert result["failures"][0]["message"] == "the server's own words"


def test_a_picture_that_the_store_has_lost_is_reported_and_the_others_go_on(
    core: Core, server: CaptionerServer
) -> None:
    dataset_id = add_dataset(core, images=2)
    lost = next(image for image in images_of(core, dataset_id).values() if image.path == "dog/3.png")
    core.store.delete(core.store.blob_key(lost.sha256))
    result = done(core, submit(core, dataset_id))
    assert counted(result, "captions", "failed") == (6, 2)
    assert {(each["path"], each["code"]) for each in result["failures"]} == {("dog/3.png", "not_found")}


def test_a_job_of_which_everything_is_refused_fails(core: Core, server: CaptionerServer) -> None:
    server.answer = lambda _: Answer(status=400)
    job = run(core, submit(core, add_dataset(core, images=1)))
    assert (job.status, job.error and job.error["code"]) == ("failed", "nothing_captioned")


def test_a_caption_over_the_budget_is_asked_for_in_fewer_words(core: Core, server: CaptionerServer) -> None:
    server.answer = lambda asked: Answer(SENTENCE * (9 if asked.words == 50 else 2))
    job_id = submit(core, add_dataset(core, images=1), characteristics=["visual"], seed=3)
    assert counted(done(core, job_id), "reasked", "trimmed", "captions") == (2, 0, 2)
    assert server.calls == 4
    first, again = sorted((a for a in server.asked if a.class_name == "cat"), key=lambda asked: -asked.words)
    assert (first.words, first.body["seed"], again.body["seed"]) == (50, 3, 3)
    assert f"in {again.words} words" in again.prompt
    row = captions_of(core, job_id)[0]
    assert row.clip_tokens <= 77
    assert "over_budget" not in row.flags
    assert (row.provenance["reasks"], row.provenance["words"], row.provenance["trimmed"]) == (1, again.words, False)
    assert row.provenance["prompt"] == again.prompt, "the one that this answer was given to"
    assert row.provenance["completion_tokens"] == 6, "both requests were paid for"
    told = row.provenance["first"]
    assert (told["prompt"], told["words"], told["raw"]) == (first.prompt, 50, SENTENCE * 9)
    assert (told["completion_tokens"], told["finish_reason"]) == (3, "stop")
    calls = server.calls
    assert done(core, submit(core, row.dataset_id, characteristics=["visual"], seed=3))["reused"] == 2
    assert server.calls == calls, "it is found by the first prompt's key"


@pytest.mark.parametrize("reasks", [0, 2])
def test_a_caption_that_stays_too_long_is_trimmed_at_a_sentence(
    core: Core, server: CaptionerServer, reasks: int
) -> None:
    server.answer = lambda asked: Answer(SENTENCE * 9)
    job_id = submit(core, add_dataset(core, images=1), characteristics=["visual"], reasks=reasks)
    result = done(core, job_id)
    assert counted(result, "reasked", "trimmed") == (2 if reasks else 0, 2)
    assert server.calls == 2 * (1 + reasks)
    for row in captions_of(core, job_id):
        assert row.clip_tokens <= 77
        assert row.text.endswith("mat.")
        assert (row.provenance["reasks"], row.provenance["trimmed"]) == (reasks, True)
        assert row.provenance["raw"] == SENTENCE * 9


def test_a_template_that_names_no_length_is_asked_for_at_most_so_many_words(
    core: Core, server: CaptionerServer
) -> None:
    server.answer = lambda asked: Answer(SENTENCE * (1 if "at most" in asked.prompt else 9))
    template = {"name": "gaze", "template": "Describe the {class_name}."}
    result = done(core, submit(core, add_dataset(core, images=1), characteristics=[template]))
    assert counted(result, "reasked", "trimmed") == (2, 0)
    assert {asked.prompt.partition(" Use at most ")[0] for asked in server.asked} == {
        "Describe the cat.",
        "Describe the dog.",
    }


def test_a_refused_second_try_leaves_the_first(core: Core, server: CaptionerServer) -> None:
    server.answer = lambda asked: Answer(SENTENCE * 9) if asked.words == 50 else Answer(status=400)
    result = done(core, submit(core, add_dataset(core, images=1), characteristics=["visual"]))
    assert counted(result, "captions", "failed", "trimmed") == (2, 0, 2)


def test_one_slow_request_holds_up_no_other(core: Core, server: CaptionerServer) -> None:
    """There is no barrier: with the first request hanging, every other caption is written."""
    release = threading.Event()

    def slow(asked: Asked) -> Answer:
        release.wait(30 if asked.number == 1 else 0.02)
        return Answer(f"coat of {asked.picture[-9:]}")

    server.answer = slow
    job_id = submit(core, add_dataset(core, images=40))
    thread = in_thread(lambda: done(core, job_id))
    wait_for(lambda: len(captions_of(core, job_id)) == 159)
    release.set()
    thread.join(20)
    assert read_job(core, job_id).status == "succeeded"
    assert server.most_in_flight == 8, "caption_concurrency"


def test_pictures_are_read_once_and_few_at_a_time(
    core: Core, server: CaptionerServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory is that of the requests in flight, whatever the number of images."""
    read: Counter[str] = Counter()
    read_blob = core.store.read_blob

    def counting(digest: str) -> bytes:
        read[digest] += 1
        return read_blob(digest)

    monkeypatch.setattr(core.store, "read_blob", counting)
    gate = Gate(server, 0)
    job_id = submit(core, add_dataset(core, images=40), characteristics=["visual", "shape", "color"])
    thread = in_thread(lambda: done(core, job_id))
    wait_for(lambda: server.in_flight == 8)
    time.sleep(0.5)
    assert read.total() <= 6, "eight requests are in flight, eight more captions are read ahead: 16 / 3 images"
    together = Counter(asked.picture for asked in server.asked)
    assert sorted(together.values()) == [2, 3, 3], "the prompts of an image go out together"
    gate.open.set()
    thread.join(30)
    assert set(read.values()) == {1}
    assert len(read) == 80
