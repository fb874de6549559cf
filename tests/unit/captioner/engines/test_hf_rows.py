"""Rows of one batch of the Hugging Face engine: each stops, streams, thinks, fails and is retried by itself."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from services.captioner import metrics
from services.captioner.engines.base import CaptionRequest, Generation
from services.captioner.engines.hf import HFEngine
from shared.errors import InvalidInput, Unavailable
from tests import tiny_mllm
from tests.hf_engine import make, run


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> HFEngine:
    return make(checkpoint)


@pytest.fixture
def engine(loaded: HFEngine) -> HFEngine:
    loaded._fitting.clear()
    loaded._beginnings = None  # the tests script and count the `generate` calls: one per batch
    return loaded


def picture(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (60, 90, 3), dtype=np.uint8))


def ask(prompt: str = "describe the dog", max_tokens: int = 24, **options: Any) -> CaptionRequest:
    return CaptionRequest((picture(),), prompt, max_tokens, **{"temperature": 0.0, **options})


def count(series: Any, *labels: str) -> float:
    return float(series.labels("tiny", *labels)._value.get())


@contextmanager
def scores(engine: HFEngine, change: Callable[[torch.Tensor], torch.Tensor | None]) -> Iterator[None]:
    """`change` may replace the scores (B, V) of every step."""

    def hook(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor | None:
        changed = change(output[:, -1])
        return None if changed is None else changed.unsqueeze(1)

    handle = engine._model.lm_head.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def saying(engine: HFEngine, *texts: str) -> Any:
    """Row n of each `generate` call writes texts[n]."""
    tokenizer, end, step = engine._processor.tokenizer, min(engine._end_ids), iter(range(10**6))
    ids = [[*tokenizer.encode(text), end] for text in texts]

    def change(before: torch.Tensor) -> torch.Tensor:
        now, after = next(step), torch.zeros_like(before)
        for row in range(len(before)):
            after[row, ids[row][now] if now < len(ids[row]) else end] = 1.0
        return after

    return scores(engine, change)


# Stop strings and streams


def test_stop_strings_end_their_own_row_early(engine: HFEngine) -> None:
    texts = ["a dog. STOP and much more of it", "the tail STOP is long", "a STOP"]
    requests = [ask(stop=("STOP",)), ask(), ask(stop=("zebra", ""))]
    with saying(engine, *texts):
        first, second, third = run(engine, requests)
    assert (first.text, first.finish_reason) == ("a dog.", "stop")
    assert first.completion_tokens == len(engine._processor.tokenizer.encode("a dog. STOP"))
    assert (second.text, third.text) == (texts[1], texts[2])


def test_a_batch_ends_when_all_its_rows_have_stopped(engine: HFEngine) -> None:
    steps: list[int] = []
    with saying(engine, "a dog.\nand more of it", "no tail\nand more"), scores(engine, lambda s: steps.append(len(s))):
        outcomes = run(engine, [ask(stop=("\n",)), ask(stop=("\n", "x"))])
    assert [outcome.text for outcome in outcomes] == ["a dog.", "no tail"]
    assert len(steps) == max(outcome.completion_tokens for outcome in outcomes) < 12


@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_streams_are_beginnings_of_their_texts_and_change_nothing(engine: HFEngine, temperature: float) -> None:
    pieces: list[list[str]] = [[] for _ in range(6)]
    plain = [ask(f"describe {n}", 20 + 5 * n, temperature=temperature, seed=n) for n in range(6)]
    streamed = [replace(request, on_text=pieces[n].append) for n, request in enumerate(plain)]
    expected = run(engine, plain)
    outcomes = run(engine, [*streamed[:5], plain[5]])
    assert outcomes == expected
    assert not pieces[5]
    for sent, outcome in zip(pieces[:5], outcomes, strict=False):
        assert len(sent) > 3
        assert outcome.text.startswith("".join(sent))
        assert len("".join(sent)) >= len(outcome.text.rstrip("\ufffd")) - 4


def test_an_unwatched_batch_is_not_looked_at_token_by_token(engine: HFEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise AssertionError("a row is watched")

    monkeypatch.setattr("services.captioner.engines.hf.RowWatch", fail)
    assert run(engine, [ask(), ask(temperature=0.5)])
    with pytest.raises(AssertionError, match="watched"):
        run(engine, [ask(stop=("x",))])


# Thoughts


def with_template(checkpoint: Path, folder: Path, ending: str) -> Path:
    tiny_mllm.build(folder)
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text() + "{% if add_generation_prompt %}" + ending + "{% endif %}")
    return folder


def test_thoughts_are_no_part_of_the_text_but_of_the_count(engine: HFEngine) -> None:
    pieces: list[str] = []
    texts = ["<think>is it?</think>a dog", "◁think▷no◁/think▷ a cat", "a tail <think>is"]
    with saying(engine, *texts):
        outcomes = run(engine, [ask(max_tokens=40), ask(max_tokens=40, on_text=pieces.append), ask(max_tokens=40)])
    assert [outcome.text for outcome in outcomes] == ["a dog", "a cat", "a tail"]
    assert "".join(pieces) == "a cat"
    encode = engine._processor.tokenizer.encode
    assert [outcome.completion_tokens for outcome in outcomes] == [len(encode(text)) + 1 for text in texts]


def test_the_template_is_told_not_to_think(checkpoint: Path, tmp_path: Path, engine: HFEngine) -> None:
    assert engine._template_switches == {}  # its template knows none
    ending = "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    switched = make(with_template(checkpoint, tmp_path / "switched", ending))
    prompt = switched._processor.tokenizer.decode(switched.prepare(ask()).tensors["input_ids"][0].tolist())
    assert prompt.endswith("assistant\n<think>\n\n</think>\n\n")
    with saying(switched, "a dog"):
        assert run(switched, [ask()])[0].text == "a dog"


def test_a_template_that_always_begins_a_thought(checkpoint: Path, tmp_path: Path) -> None:
    pieces: list[str] = []
    thinker = make(with_template(checkpoint, tmp_path / "thinker", "<think>\n"))
    with saying(thinker, "hm, a dog?</think>a dog"):
        assert run(thinker, [ask(on_text=pieces.append)])[0].text == "a dog"
    assert "".join(pieces) == "a dog"
    user = [ask("end with <think>"), ask("<think>")]  # a caller's words begin no thought
    with saying(thinker, "x</think>a dog", "x</think>a cat"):
        assert [outcome.text for outcome in run(thinker, user)] == ["a dog", "a cat"]


# Memory


def cuda_style() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def cublas_style() -> None:
    raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")


def for_real() -> None:
    torch.empty(2**58)


@contextmanager
def room_for(engine: HFEngine, rows: int, run_out: Callable[[], None], at_step: int = 0) -> Iterator[list[int]]:
    """More than `rows` rows run out of memory at a step of each call; yields the sizes that were tried."""
    tried: list[int] = []
    step = 0

    def change(before: torch.Tensor) -> None:
        nonlocal step
        step += 1
        if step == 1:
            tried.append(len(before))
        if step > at_step and len(before) > rows:
            step = 0
            run_out()

    def begin(module: Any, args: Any, kwargs: Any) -> None:
        nonlocal step
        if not kwargs["past_key_values"].get_seq_length():  # the first step of a call
            step = 0

    handle = engine._model.register_forward_pre_hook(begin, with_kwargs=True)
    try:
        with scores(engine, change):
            yield tried
    finally:
        handle.remove()


@pytest.mark.parametrize("run_out", [cuda_style, cublas_style, for_real])
def test_a_batch_that_does_not_fit_is_halved_and_nothing_is_lost(engine: HFEngine, run_out: Callable[[], None]) -> None:
    requests = [ask(f"describe {n}", temperature=1.0 * (n % 2), seed=n) for n in range(7)]
    expected, before = run(engine, requests), count(metrics.OUT_OF_MEMORY)
    with room_for(engine, 2, run_out) as tried:
        assert run(engine, requests) == expected
        assert tried == [7, 4, 2, 2, 2, 1]
        assert count(metrics.OUT_OF_MEMORY) == before + 2
        tried.clear()
        assert run(engine, requests) == expected
        assert tried == [2, 2, 2, 1]  # it remembers
        tried.clear()
        assert run(engine, [replace(request, max_tokens=100) for request in requests[:3]])
        assert tried == [3, 2, 1]  # that another bucket fits no better is not taken for granted


def test_a_size_that_did_not_fit_is_tried_again_later(engine: HFEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [ask(f"describe {n}") for n in range(4)]
    with room_for(engine, 2, cuda_style):
        run(engine, requests)
    monkeypatch.setattr("services.captioner.engines.hf.time.monotonic", lambda: 1e12)
    with room_for(engine, 9, cuda_style) as tried:
        run(engine, requests)
    assert tried == [4]


def test_a_request_that_does_not_fit_alone_is_answered_alone(engine: HFEngine) -> None:
    prepared = [engine.prepare(ask(f"describe {n}")) for n in range(2)]
    expected = [engine.finish(raw) for raw in engine.generate(prepared)]
    calls = 0

    def unlucky() -> None:
        nonlocal calls
        calls += 1
        if calls <= 3:  # both together, then the first alone, also once memory was made free
            cuda_style()

    with room_for(engine, 0, unlucky):
        first, second = engine.generate(prepared)
    with pytest.raises(InvalidInput, match=r"nf4") as caught:
        engine.finish(first)
    assert caught.value.code == "out_of_memory"
    assert engine.finish(second) == expected[1]


def test_a_stream_goes_on_after_its_batch_was_halved(engine: HFEngine) -> None:
    pieces: list[str] = []
    requests = [ask(temperature=1.0, seed=3, on_text=pieces.append), ask("describe the tail")]
    expected = run(engine, [replace(request, on_text=None) for request in requests])
    with room_for(engine, 1, cuda_style, at_step=15) as tried:
        outcomes = run(engine, requests)
    assert tried == [2, 1, 1]
    assert outcomes == expected
    assert len(pieces) > 3
    assert outcomes[0].text.startswith("".join(pieces))


def test_a_stream_whose_text_came_out_otherwise_the_second_time_is_an_error(engine: HFEngine) -> None:
    pieces: list[str] = []
    requests = [ask(temperature=1.0, on_text=pieces.append), ask("describe the tail")]  # no seed
    prepared = [engine.prepare(request) for request in requests]
    with room_for(engine, 1, cuda_style, at_step=15):
        first, second = engine.generate(prepared)
    assert not first.text.startswith("".join(pieces))
    with pytest.raises(Unavailable) as caught:
        engine.finish(first)
    assert caught.value.code == "generation_interrupted"
    assert engine.finish(second).text


def test_other_errors_are_not_taken_for_lack_of_memory(engine: HFEngine) -> None:
    def fail() -> None:
        raise RuntimeError("the device is lost")

    with room_for(engine, 0, fail) as tried, pytest.raises(RuntimeError, match="lost"):
        run(engine, [ask(), ask()])
    assert tried == [2]


# Not a number, and nothing at all


def breaking(rows: Callable[[int], list[int]], at_step: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """NaN in some rows (by the batch's size) from a step on."""
    step = 0

    def change(before: torch.Tensor) -> torch.Tensor:
        nonlocal step
        step += 1
        after = before.clone()
        if step > at_step:
            after[rows(len(before)), 7] = float("nan")
        return after

    return change


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_of_nan_in_a_batch_is_tried_again_by_itself(engine: HFEngine, temperature: float) -> None:
    pieces: list[str] = []
    requests = [ask(f"describe {n}", temperature=temperature, seed=n) for n in range(3)]
    expected, before = run(engine, requests), count(metrics.RETRIES, "not_a_number")
    requests[1] = replace(requests[1], on_text=pieces.append)
    with scores(engine, breaking(lambda size: [1] if size > 1 else [], at_step=6)):
        assert run(engine, requests) == expected
    assert count(metrics.RETRIES, "not_a_number") == before + 1
    assert expected[1].text.startswith("".join(pieces))


def test_a_row_of_nan_that_stays_so_is_an_error_of_its_own(engine: HFEngine) -> None:
    requests = [ask(f"describe {n}") for n in range(3)]
    expected = run(engine, requests)
    prepared = [engine.prepare(request) for request in requests]
    steps: list[int] = []
    with (
        scores(engine, lambda s: steps.append(len(s))),
        scores(engine, breaking(lambda size: [1] if size > 1 else [0], 3)),
    ):
        raws = engine.generate(prepared)
    assert steps == [3] * 24 + [1]  # the retry ends at once
    assert [engine.finish(raws[n]) for n in (0, 2)] == [expected[0], expected[2]]
    with pytest.raises(InvalidInput, match="bf16") as caught:
        engine.finish(raws[1])
    assert caught.value.code == "not_a_number"


def ending_at_once(engine: HFEngine, calls: int) -> Callable[[torch.Tensor], torch.Tensor | None]:
    """The first scores of the first `calls` calls are for the end token."""
    left = calls

    def change(before: torch.Tensor) -> torch.Tensor | None:
        nonlocal left
        left -= 1
        if left < 0:
            return None
        after = torch.full_like(before, -1e9)
        after[:, min(engine._end_ids)] = 0.0
        return after

    return change


def test_empty_sampled_texts_are_drawn_again_from_another_seed(engine: HFEngine) -> None:
    requests = [ask(f"describe {n}", temperature=1.0, seed=n) for n in range(3)]
    first, before = run(engine, requests), count(metrics.RETRIES, "empty")

    def again() -> list[Generation]:
        with scores(engine, ending_at_once(engine, 1)):
            return run(engine, requests)

    outcomes = again()
    assert count(metrics.RETRIES, "empty") == before + 3
    assert all(outcome.text for outcome in outcomes)
    assert all(outcome.text != old.text for outcome, old in zip(outcomes, first, strict=True))
    assert again() == outcomes  # which hangs on the seed that was given


def test_empty_greedy_texts_are_tried_again_alone_and_then_reported(
    engine: HFEngine, caplog: pytest.LogCaptureFixture
) -> None:
    requests = [ask(f"describe {n}") for n in range(2)]
    expected = run(engine, requests)
    with scores(engine, ending_at_once(engine, 1)):
        assert run(engine, requests) == expected
    with scores(engine, ending_at_once(engine, 2)), caplog.at_level(logging.WARNING):
        first, second = run(engine, requests)
    assert (first.text, first.completion_tokens, first.finish_reason) == ("", 1, "stop")
    assert second == expected[1]
    assert "empty text" in caplog.text
    before = count(metrics.RETRIES, "empty")
    with scores(engine, ending_at_once(engine, 9)):
        assert run(engine, requests[:1])[0].text == ""  # alone already: it would only repeat itself
    assert count(metrics.RETRIES, "empty") == before


# What prompts of one picture share, and which prompts may share a batch


def test_prompts_of_one_picture_pass_the_vision_tower_once(engine: HFEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [
        CaptionRequest((picture(seed),), f"describe its {what}", 16, 0.0)
        for seed in (41, 42)
        for what in ("shape", "texture", "pattern and its surface")
    ]
    vision = engine._vision
    assert vision is not None
    before = vision.encoded, vision.reused
    together = run(engine, requests)
    assert (vision.encoded - before[0], vision.reused - before[1]) == (2, 4)
    assert run(engine, requests[:1]) == together[:1]
    assert (vision.encoded - before[0], vision.reused - before[1]) == (2, 5)  # also from batch to batch
    monkeypatch.setattr(engine, "_vision", None)
    assert run(engine, requests) == together


def test_image_tokens_are_counted(engine: HFEngine) -> None:
    none, one, two = run(
        engine,
        [
            CaptionRequest((), "describe", 4, 0.0),
            CaptionRequest((picture(),), "describe", 4, 0.0),
            CaptionRequest((picture(), picture(1)), "describe", 4, 0.0),
        ],
    )
    assert none.image_tokens == 0
    assert one.image_tokens > 0
    assert two.image_tokens == 2 * one.image_tokens
    assert two.prompt_tokens - one.prompt_tokens == one.image_tokens + 2  # and a start and an end
    assert one.prompt_tokens - none.prompt_tokens == one.image_tokens + 2


def test_buckets_keep_long_from_short(engine: HFEngine) -> None:
    def bucket(words: int, max_tokens: int, images: int = 1) -> Any:
        return engine.bucket(engine.prepare(CaptionRequest((picture(),) * images, "dog " * words, max_tokens)))

    assert bucket(3, 50) == bucket(9, 64)
    assert bucket(3, 64) != bucket(3, 65)
    assert bucket(3, 5) == bucket(3, 20)
    assert bucket(3, 50) != bucket(300, 50)
    assert bucket(3, 50) != bucket(3, 50, images=12)
    items = [engine.prepare(ask("dog " * n, 40)) for n in range(1, 400, 7)]
    for kind in {engine.bucket(item) for item in items}:
        lengths = [item.prompt_tokens for item in items if engine.bucket(item) == kind]
        assert max(lengths) < 2 * min(lengths) or max(lengths) <= 128


def test_a_cpu_is_no_device_with_memory_of_its_own(engine: HFEngine) -> None:
    assert engine.device_memory() is None
