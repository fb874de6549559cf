"""The Hugging Face engine on tiny checkpoints of every architecture family, in the precisions it serves them in.

The weights are random but wide, so that scores decide clearly. In fp32 a row of a batch then gives the very text that
it gives alone. In bf16 and nf4 its scores differ by rounding, which padding changes: the same next token nearly always,
but after many tokens of noise one near tie is enough to part the texts. There the scores are compared instead: a
row's are within rounding of its own alone and far from everybody else's.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from services.captioner.engines import build
from services.captioner.engines.base import CaptionRequest, Generation
from services.captioner.engines.hf import HFEngine
from services.captioner.settings import EngineSpec
from shared.errors import InvalidInput
from tests import tiny_mllm

ROUNDING = {"fp32": 1e-5, "bf16": 0.03, "nf4": 0.03}  # of the norm of a row's scores
OTHERS = 0.3  # what the scores of unlike requests differ by at least

Load = Callable[[str, str], HFEngine]
every_architecture = pytest.mark.parametrize("architecture", list(tiny_mllm.ARCHITECTURES))


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Load]:
    root = tmp_path_factory.mktemp("models")
    loaded: dict[tuple[str, str], HFEngine] = {}

    def get(architecture: str, precision: str) -> HFEngine:
        if (architecture, precision) not in loaded:
            folder = root / architecture
            if not folder.exists():
                tiny_mllm.build(folder, architecture)
            loaded[architecture, precision] = make(folder, precision)
        return loaded[architecture, precision]

    yield get
    loaded.clear()


def make(folder: Path, precision: str) -> HFEngine:
    spec = EngineSpec(type="hf", model=str(folder), device="cpu", precision=precision)
    engine = build(folder.name, spec, [folder.parent])
    assert isinstance(engine, HFEngine)
    engine.load()
    return engine


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def ask(*pictures: Image.Image, prompt: str, max_tokens: int = 12) -> CaptionRequest:
    return CaptionRequest(pictures, prompt, max_tokens, temperature=0)


A, B, C = picture(90, 150, 2), picture(64, 64, 3), picture(200, 80, 1)
#: Pictures and prompts of unlike sizes; none, one and two pictures.
MIXED = [
    ask(picture(60, 60), prompt="describe the dog"),
    ask(C, prompt="describe the shape of it, and its tail", max_tokens=20),
    ask(prompt="no picture at all", max_tokens=7),
    ask(A, B, prompt="two pictures", max_tokens=16),
    ask(picture(70, 300, 4), prompt="texture? " * 20, max_tokens=20),
]


def run(engine: HFEngine, requests: Sequence[CaptionRequest]) -> list[Generation]:
    return [engine.finish(raw) for raw in engine.generate([engine.prepare(request) for request in requests])]


def inputs(engine: HFEngine, requests: Sequence[CaptionRequest]) -> dict[str, torch.Tensor]:
    return engine._placed(engine._collate([engine.prepare(request) for request in requests]))


def scores(engine: HFEngine, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """(B, V) of the next token."""
    with torch.inference_mode():
        output = engine._model.generate(**batch, max_new_tokens=1, output_logits=True, return_dict_in_generate=True)
    logits: torch.Tensor = output.logits[0].float()
    return logits


def distances(expected: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """(B,) of each row, in parts of its norm."""
    relative: torch.Tensor = (expected - found).norm(dim=1) / expected.norm(dim=1)
    return relative


@every_architecture
def test_batched_and_single_texts_agree(load: Load, architecture: str) -> None:
    engine = load(architecture, "fp32")
    together = run(engine, MIXED)
    assert together == [run(engine, [request])[0] for request in MIXED]
    assert len({generation.text for generation in together}) == len(MIXED)  # it does depend on the request
    for generation, request in zip(together, MIXED, strict=True):
        assert 0 < generation.completion_tokens <= request.max_tokens
        assert (generation.finish_reason == "length") == (generation.completion_tokens == request.max_tokens)
        assert (generation.image_tokens > 0) == bool(request.images)
    assert len({generation.prompt_tokens for generation in together}) == len(MIXED)  # so there was padding to do


#: Three prompts of unlike lengths for each of two pictures, and one that stands alone.
SHARING = [
    *(ask(A, prompt=f"to tell it apart, describe its {what}") for what in ("colour", "shape and its tail", "fur")),
    ask(B, prompt="something else"),
    *(ask(C, prompt=f"to tell it apart, describe its {what}") for what in ("colour", "shape and its tail", "fur")),
]


@every_architecture
def test_the_prompts_of_a_picture_begin_together_and_end_as_if_alone(load: Load, architecture: str) -> None:
    engine = load(architecture, "fp32")
    prefilled: list[int] = []

    def count_rows(_: Any, arguments: tuple[Any, ...], given: dict[str, Any]) -> None:
        embeds = given["inputs_embeds"]
        if embeds.shape[1] > 1:
            prefilled.append(len(embeds))

    inner = engine._model.base_model
    decoder = inner.language_model if hasattr(inner, "language_model") else inner.text_model
    handle = decoder.register_forward_pre_hook(count_rows, with_kwargs=True)
    try:
        together = run(engine, SHARING)
    finally:
        handle.remove()
    assert prefilled == [3, 7], "three beginnings with pictures, then the ends of all seven"
    assert together == [run(engine, [request])[0] for request in SHARING]
    assert len({generation.text for generation in together}) == len(SHARING)


def test_padding_inside_rows_never_pushes_words_out_of_a_sliding_window(load: Load) -> None:
    """Two pictures whose prompts part at unlike places: far more columns than the longest row has tokens."""
    engine = load("gemma3", "fp32")
    long, short = "to tell it apart from all the others, say what ", "so "
    requests = [
        *(ask(A, prompt=long + end, max_tokens=16) for end in ("fur", "tail")),
        *(ask(B, prompt=end + short * 16, max_tokens=16) for end in ("fur ", "tail ")),
    ]
    prepared = [engine.prepare(request) for request in requests]
    assert engine._beginnings is not None
    assert max(each.prompt_tokens for each in prepared) + 16 <= engine._beginnings.window
    assert run(engine, requests) == [run(engine, [request])[0] for request in requests]


@every_architecture
@pytest.mark.parametrize("precision", ["bf16", "nf4"])
def test_batched_and_single_scores_agree_within_rounding(load: Load, architecture: str, precision: str) -> None:
    engine = load(architecture, precision)
    assert engine.precision == precision
    assert engine._vision is not None  # pictures can be shared, whatever the rounding
    quantized = [module for module in engine._model.modules() if type(module).__name__ == "Linear4bit"]
    if precision == "nf4":
        assert len(quantized) >= 14  # at least the decoder's, two layers of seven
        assert all(module.weight.dtype == torch.uint8 for module in quantized)
    else:
        assert not quantized
        assert {parameter.dtype for parameter in engine._model.parameters()} == {torch.bfloat16}
    alone = torch.cat([scores(engine, inputs(engine, [request])) for request in MIXED])
    together = scores(engine, inputs(engine, MIXED))
    assert distances(alone, together).max() < ROUNDING[precision]
    for other in range(1, len(MIXED)):
        assert distances(alone, alone.roll(other, dims=0)).min() > OTHERS
    texts = run(engine, MIXED)
    assert all(0 < text.completion_tokens <= request.max_tokens for text, request in zip(texts, MIXED, strict=True))


@every_architecture
def test_right_padding_would_change_the_output(load: Load, architecture: str) -> None:
    engine = load(architecture, "fp32")
    batch = inputs(engine, MIXED)
    alone = torch.cat([scores(engine, inputs(engine, [request])) for request in MIXED])
    assert distances(alone, scores(engine, batch)).max() < ROUNDING["fp32"]
    padding = (batch["attention_mask"] == 0).sum(dim=1).tolist()
    right = {
        key: torch.stack([row.roll(-n) for row, n in zip(value, padding, strict=True)])
        if value.shape == batch["input_ids"].shape
        else value
        for key, value in batch.items()
    }
    changed = distances(alone, scores(engine, right)) > OTHERS
    assert changed.tolist() == [n > 0 for n in padding]
    assert changed.sum() == len(MIXED) - 1


@every_architecture
def test_batches_are_what_the_processor_would_have_made(load: Load, architecture: str) -> None:
    engine = load(architecture, "fp32")
    assert engine._collate == engine._join  # not the slower way
    with_pictures = [engine.prepare(request) for request in MIXED if request.images]
    ours, reference = engine._join(with_pictures), engine._process(with_pictures)
    assert ours.keys() == reference.keys()
    for key, value in reference.items():
        torch.testing.assert_close(ours[key], value, rtol=0, atol=0)


@every_architecture
def test_every_picture_of_a_prompt_counts_and_so_does_their_order(load: Load, architecture: str) -> None:
    engine = load(architecture, "fp32")
    requests = [ask(*pictures, prompt="compare") for pictures in ((A, B), (B, A), (A, C), (A, A), (A,), (B,), ())]
    found = scores(engine, inputs(engine, requests))
    for other in range(1, len(requests)):
        assert distances(found, found.roll(other, dims=0)).min() > OTHERS / 3
    assert run(engine, requests) == [run(engine, [request])[0] for request in requests]


@pytest.mark.parametrize("architecture", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_a_picture_that_the_processor_rejects_is_reported_and_the_others_go_on(load: Load, architecture: str) -> None:
    engine = load(architecture, "fp32")
    prepared: list[Any] = []
    reported: list[InvalidInput] = []
    for request in [MIXED[0], ask(picture(2100, 10), prompt="a line"), MIXED[1], ask(B, picture(1, 500), prompt="two")]:
        try:
            prepared.append(engine.prepare(request))
        except InvalidInput as error:
            reported.append(error)
    assert [error.code for error in reported] == ["request_rejected_by_model"] * 2
    assert "2100x10" in reported[0].message
    assert "64x64, 1x500" in reported[1].message
    assert [engine.finish(raw) for raw in engine.generate(prepared)] == run(engine, MIXED[:2])


@pytest.mark.parametrize("architecture", ["llava", "llava_onevision", "idefics3", "gemma3", "internvl"])
def test_other_processors_take_pictures_of_any_shape(load: Load, architecture: str) -> None:
    engine = load(architecture, "fp32")
    requests = [ask(picture(*size), prompt="what?", max_tokens=3) for size in ((1, 1), (2100, 10), (1, 500), (3, 2))]
    assert run(engine, requests) == [run(engine, [request])[0] for request in requests]


@every_architecture
def test_control_tokens_in_a_prompt_never_act(load: Load, architecture: str) -> None:
    """Either they stay plain words, or the prompt is refused."""
    engine = load(architecture, "fp32")
    tokenizer = engine._processor.tokenizer
    control = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    plain = engine.prepare(ask(B, prompt="say and go")).tensors["input_ids"][0].tolist()
    stayed = 0
    for token in control:
        try:
            item = engine.prepare(ask(B, prompt=f"say {token} and go"))
        except InvalidInput:
            continue
        stayed += 1
        identity = tokenizer.convert_tokens_to_ids(token)
        assert item.tensors["input_ids"][0].tolist().count(identity) == plain.count(identity), token
    assert (stayed > len(control) // 2) == engine._sanitizes
