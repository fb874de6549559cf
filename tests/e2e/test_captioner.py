"""The captioner as its users know it: captions previewed, read, mended, redone, carried elsewhere and trained on; any
OpenAI client, and a model server of somebody else's that goes away while a job runs."""

import base64
import json
from pathlib import Path

import httpx
import openai
import pytest

from captune import CaptuneAPIError, Client
from services.embedded.stack import Stack
from shared.schemas.captions import CaptionJob
from shared.schemas.datasets import Dataset
from tests.e2e import pictures
from tests.e2e.conftest import ModelServer
from tests.e2e.waiting import finished, succeeded, until

TEMPLATE = {"name": "outline", "template": "What is the outline of this {class_name}? Say {it} in {words} words."}


@pytest.fixture(scope="module")
def mine(client: Client, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """A data set that only these tests write captions for: 3 classes, 4 pictures each."""
    folder = pictures.write_folder(tmp_path_factory.mktemp("mine"), pictures.by_split(4, 0, 2))
    return succeeded(client, client.push(folder, name="mine", domain="simple shapes", val_fraction=0))


@pytest.fixture(scope="module")
def job(client: Client, mine: Dataset) -> CaptionJob:
    return succeeded(client, client.caption(dataset_id=mine.id, words=14, seed=31))


def test_a_dry_run_tells_prompts_calls_and_time_and_writes_nothing(client: Client, mine: Dataset) -> None:
    found = client.preview_captions(
        dataset_id=mine.id, engine="tiny", characteristics=["shape", TEMPLATE], words=9, temperature=0, live=True
    )
    assert (found.images, found.captions, found.model_calls) == (12, 24, 24)
    assert found.estimated_seconds is not None
    assert found.estimated_seconds > 0
    shape, outline = found.examples
    assert f"this {found.display_name} photo from other simple shapes photos" in shape.prompt
    assert outline.prompt == f"What is the outline of this {found.display_name}? Say {{it}} in 9 words."
    assert outline.raw, "the model was asked for one image"
    assert not [c for c in client.captions(mine.id) if c.provenance["engine"] == "tiny"]


def test_review_search_edit_redo_report(client: Client, mine: Dataset, job: CaptionJob) -> None:
    captions = list(client.captions(mine.id, caption_job_id=job.id))
    assert len(captions) == 36
    first, second = captions[:2]

    edited = client.edit_caption(first.id, text="A xylophone stands on the lawn.", version=first.version)
    assert (edited.original_text, edited.version) == (first.text, first.version + 1)
    assert [c.id for c in client.captions(mine.id, q="xylophones")] == [first.id], "full text, stemmed"
    with pytest.raises(CaptuneAPIError) as stale:
        client.edit_caption(first.id, text="Mine!", version=first.version)
    assert stale.value.status == 412
    assert client.edit_caption(second.id, excluded=True).excluded

    report = client.caption_report(job.id)
    assert (report.images, report.captions, report.edited, report.excluded) == (12, 36, 1, 1)
    assert sum(each.captions for each in report.tokens) == 36

    redo = {"caption_job_id": job.id, "excluded": True}
    redone = succeeded(client, client.caption(dataset_id=mine.id, redo=redo))
    assert redone.result is not None
    assert (redone.result["captions"], redone.result["written"]) == (36, 1)
    after = {c.id for c in client.captions(mine.id, caption_job_id=redone.id)}
    assert second.id not in after
    assert first.id in after, "what was edited is taken over"
    assert {c.id for c in client.captions(mine.id, caption_job_id=job.id)} == {c.id for c in captions}


@pytest.mark.parametrize("format", ["json", "jsonl", "csv", "txt"])
def test_captions_leave_and_come_back(
    client: Client, mine: Dataset, job: CaptionJob, tmp_path: Path, format: str
) -> None:
    path = client.export_captions(job.id, tmp_path / f"captions.{'zip' if format == 'txt' else format}", format=format)
    back = succeeded(client, client.import_captions(mine.id, path))
    assert back.result is not None
    assert (back.result["failed"], back.result["matched"]) == (0, 36)

    def texts(of: CaptionJob) -> list[tuple[str, str]]:
        return sorted({(c.path, c.text) for c in client.captions(mine.id, caption_job_id=of.id)})

    assert texts(back) == texts(job)


def test_training_takes_imported_captions_and_tells_what_it_left_out(
    client: Client, models: Path, mine: Dataset, tmp_path: Path
) -> None:
    images = sorted(image.path for image in client.images(mine.id, split="train"))
    given = {
        path: [f"A plain thing of kind {n}.", "I'm sorry, I can't help with that."] for n, path in enumerate(images)
    }
    given["nobody/knows.png"] = ["A stranger."]
    path = tmp_path / "own.json"
    path.write_text(json.dumps(given))
    imported = succeeded(client, client.import_captions(mine.id, path))
    assert imported.result is not None
    assert imported.result["unmatched"]["total"] == 1

    def run(**more: object) -> dict[str, object]:
        method = {"type": "mmft", "hyperparameters": {"epochs": 1, "batch_size": 4}}
        job = client.train(
            model=str(models / "clip"),
            dataset_id=mine.id,
            caption_job_id=imported.id,
            method=method,
            validation="none",
            **more,
        )
        result = succeeded(client, job).result
        assert result is not None
        return result

    assert (run()["captions_used"], run()["captions_left_out"]) == (12, {"refusal": 12})
    assert run(exclude_flags=[])["captions_used"] == 24


def test_the_official_client_talks_to_the_running_system(stack: Stack) -> None:
    uri = f"data:image/png;base64,{base64.b64encode(pictures.png()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": "Describe its shape."}]
    with openai.OpenAI(base_url=f"{stack.url}/v1", api_key=stack.api_key) as official:
        assert {model.id for model in official.models.list()} == {"attributes", "tiny", "remote"}
        asked = {"model": "tiny", "messages": [{"role": "user", "content": content}], "max_tokens": 12, "seed": 1}
        answer = official.chat.completions.create(n=2, **asked)  # type: ignore[call-overload]
        assert len(answer.choices) == 2
        pieces = official.chat.completions.create(stream=True, **asked)  # type: ignore[call-overload]
        text = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
        assert text == answer.choices[0].message.content


def test_a_model_server_that_goes_and_comes_back_costs_no_caption(
    client: Client, many: Dataset, model_server: ModelServer
) -> None:
    job = client.caption(dataset_id=many.id, engine="remote", words=12, limit=120, reasks=0)

    def written() -> int:
        return sum(1 for _ in client.captions(many.id, caption_job_id=job.id))

    until("the first captions are written", written, 60)
    model_server.stop()
    assert client.job(job.id).status == "running", "it ended before the server was gone"
    have = written()
    model_server.start()
    job = succeeded(client, job, 120)
    assert have < 360
    found = [(c.image_id, c.characteristic) for c in client.captions(many.id, caption_job_id=job.id)]
    assert len(found) == len(set(found)) == 360
    assert job.result is not None
    assert (job.result["written"], job.result["failed"]) == (360, 0)


def test_metrics_and_readiness_tell_of_each_model(http: httpx.Client, job: CaptionJob) -> None:
    metrics = http.get("/metrics").text
    assert 'captune_captioner_captions_total{engine="attributes"}' in metrics
    for name in ("queue_depth", "batch_size_bucket", "seconds_bucket", "completion_tokens_total"):
        assert f"captune_captioner_{name}" in metrics
    ready = http.get("/readyz").json()
    assert ready["details"]["model"]["tiny"]["state"] == "ready"
    assert ready["details"]["model"]["tiny"]["rate"]["captions_per_second"] > 0


def test_a_misspelt_template_field_is_refused_with_the_right_one(client: Client, mine: Dataset) -> None:
    with pytest.raises(CaptuneAPIError, match=r"did you mean \{class_name\}"):
        client.caption(dataset_id=mine.id, characteristics=[{"name": "mine", "template": "Describe the {classname}."}])
    job = finished(client, client.caption(dataset_id=mine.id, characteristics=["color"], limit=2, words=12))
    assert job.status == "succeeded"
