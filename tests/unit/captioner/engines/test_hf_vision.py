"""A picture passes the vision tower once: counted where the tower is called, and with the same texts as without."""

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import wraps
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from services.captioner.engines import build
from services.captioner.engines.base import CaptionRequest
from services.captioner.engines.hf import HFEngine
from services.captioner.engines.hf_vision import VisionReuse, picture_key, unit_keys
from services.captioner.settings import EngineSpec
from tests import tiny_mllm

Load = Callable[[str], HFEngine]
every_architecture = pytest.mark.parametrize("architecture", list(tiny_mllm.ARCHITECTURES))


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    root = tmp_path_factory.mktemp("models")
    loaded: dict[str, HFEngine] = {}

    def get(architecture: str) -> HFEngine:
        if architecture not in loaded:
            folder = tiny_mllm.build(root / architecture, architecture)
            spec = EngineSpec(type="hf", model=str(folder), device="cpu", precision="fp32")
            engine = build(architecture, spec, [root])
            assert isinstance(engine, HFEngine)
            engine.load()
            loaded[architecture] = engine
        reuse = loaded[architecture]._vision
        assert reuse is not None
        reuse.clear()
        return loaded[architecture]

    return get


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


A, B, C = picture(120, 60, 1), picture(60, 150, 2), picture(64, 64, 3)
PROMPTS = ("its colours", "describe the shape of it", "texture")


def ask(*pictures: Image.Image, prompt: str) -> CaptionRequest:
    return CaptionRequest(pictures, prompt, max_tokens=8, temperature=0)


def inputs(engine: HFEngine, requests: Sequence[CaptionRequest]) -> tuple[dict[str, torch.Tensor], list[str]]:
    items = [engine.prepare(request) for request in requests]
    return engine._placed(engine._collate(items)), [key for item in items for key in item.image_keys]


def run(engine: HFEngine, requests: Sequence[CaptionRequest]) -> list[list[int]]:
    """Token ids of each text, generated with pictures shared and nothing else that the engine may do."""
    batch, keys = inputs(engine, requests)
    assert engine._vision is not None
    with engine._vision.sharing(keys):
        return write(engine, batch)


def without_sharing(engine: HFEngine, requests: Sequence[CaptionRequest]) -> list[list[int]]:
    return write(engine, inputs(engine, requests)[0])


def write(engine: HFEngine, batch: dict[str, torch.Tensor]) -> list[list[int]]:
    with torch.inference_mode():
        output = engine._model.generate(**batch, max_new_tokens=8)
    rows: list[list[int]] = output[:, batch["input_ids"].shape[1] :].tolist()
    return [row[: next((n for n, token in enumerate(row) if token in engine._end_ids), None)] for row in rows]


@contextmanager
def counted(engine: HFEngine) -> Iterator[list[int]]:
    """How many pictures (or tiles) each call of the vision tower was given."""
    inner, seen = engine._model.base_model, list[int]()
    tower = next(getattr(inner, n) for n in ("visual", "vision_tower", "vision_model") if hasattr(inner, n))

    def count(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        grid = kwargs.get("grid_thw")
        seen.append(len(kwargs["pixel_values"] if "pixel_values" in kwargs else args[0]) if grid is None else len(grid))

    handle = tower.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


@every_architecture
def test_prompts_of_a_picture_pass_the_tower_once(load: Load, architecture: str) -> None:
    engine = load(architecture)
    requests = [ask(image, prompt=prompt) for prompt in PROMPTS for image in (A, B)]
    with counted(engine) as plain:
        expected = without_sharing(engine, requests)
    with counted(engine) as once:
        without_sharing(engine, requests[:2])
    assert sum(plain) == len(PROMPTS) * sum(once)
    with counted(engine) as shared:
        assert run(engine, requests) == expected
    assert shared == once
    with counted(engine) as again:  # a batch that follows
        assert run(engine, requests[::-1]) == expected[::-1]
    assert again == []
    with counted(engine) as mixed:  # one known picture, one new
        third = run(engine, [ask(C, prompt=PROMPTS[0]), requests[0]])
    with counted(engine) as alone:
        assert third == without_sharing(engine, [ask(C, prompt=PROMPTS[0])]) + expected[:1]
    assert mixed == alone
    assert len({tuple(text) for text in expected}) == len(expected)
    load(architecture)
    with counted(engine) as whole:  # and so it is when the engine itself generates
        engine.generate([engine.prepare(request) for request in requests])
    assert whole == once


@every_architecture
def test_sharing_changes_nothing_where_prompts_have_no_or_several_pictures(load: Load, architecture: str) -> None:
    engine = load(architecture)
    requests = [
        ask(A, prompt="one"),
        ask(prompt="none"),
        ask(A, B, prompt="two"),
        ask(B, A, prompt="two"),
        ask(A, A, prompt="twice"),
        ask(A, B, prompt="two, again"),
        ask(C, prompt="another"),
    ]
    expected = without_sharing(engine, requests)
    assert run(engine, requests) == expected
    for batch in ([0, 2], [2, 0], [1, 2], [3], [4, 6], [1], [0, 0], [5, 1, 4]):  # over what earlier ones left
        assert run(engine, [requests[n] for n in batch]) == [expected[n] for n in batch]


@every_architecture
def test_features_come_back_to_their_places(load: Load, architecture: str) -> None:
    """Straight from get_image_features: every unit's features, in the batch's order."""
    engine = load(architecture)
    batch, keys = inputs(engine, [ask(image, prompt="a") for image in (A, B, A, C, B)])
    assert len(set(keys)) < len(keys)
    reuse = VisionReuse(engine._model)
    expected, _ = reuse._observe(batch, lambda original, arguments: original(**arguments))
    for _ in range(2):  # encoded, then remembered
        found, _ = reuse._observe(batch, lambda original, arguments: reuse._encode(original, arguments, keys))
        torch.testing.assert_close(torch.cat(list(found.pooler_output)), torch.cat(list(expected.pooler_output)))
        assert type(found) is type(expected)
        assert isinstance(found.pooler_output, torch.Tensor) == isinstance(expected.pooler_output, torch.Tensor)
        deep = getattr(expected, "deepstack_features", None) or []
        assert (architecture == "qwen3_vl") == bool(deep)
        for layer, wanted in zip(found.deepstack_features if deep else [], deep, strict=True):
            torch.testing.assert_close(torch.cat(list(layer)), torch.cat(list(wanted)))
    assert reuse.encoded == len(set(keys))
    assert reuse.encoded + reuse.reused == 2 * len(keys)


@pytest.mark.parametrize("limits", [{"entries": 1}, {"max_bytes": 1}, {"entries": 2, "max_bytes": 5000}])
def test_memory_is_bounded_in_entries_and_bytes(load: Load, limits: dict[str, int]) -> None:
    engine = load("qwen2_vl")
    batch, keys = inputs(engine, [ask(image, prompt="a") for image in (A, B, A)])
    reuse = VisionReuse.probe(engine._model, batch, keys, name="tiny", **limits)
    assert reuse is not None
    for _ in range(3):
        for image in (A, B, C):
            batch, keys = inputs(engine, [ask(image, prompt="a"), ask(image, prompt="b")])
            with reuse.sharing(keys), torch.inference_mode():
                engine._model.generate(**batch, max_new_tokens=1)
            held = [tensor for features in reuse._features.values() for tensor in features.tensors]
            assert reuse._bytes == sum(tensor.nbytes for tensor in held) <= limits.get("max_bytes", 1 << 30)
            assert len(reuse._features) <= limits.get("entries", 1 << 30)
    assert (reuse.encoded, reuse.reused) == (9, 9)  # each shared by its two prompts, but forgotten before it returns
    reuse.clear()
    assert (reuse._bytes, len(reuse._features)) == (0, 0)


def test_features_do_not_hold_the_memory_of_their_whole_batch(load: Load) -> None:
    engine = load("qwen2_vl")
    run(engine, [ask(image, prompt="a") for image in (A, B, C)])
    assert engine._vision is not None
    held = [tensor for features in engine._vision._features.values() for tensor in features.tensors]
    assert len(held) == 3
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in held)


def test_what_was_used_last_is_kept_longest(load: Load) -> None:
    engine = load("qwen2_vl")
    reuse = VisionReuse(engine._model, entries=2)
    for image, encoded in ((A, 1), (B, 2), (A, 2), (C, 3), (A, 3), (B, 4)):
        batch, keys = inputs(engine, [ask(image, prompt="a")])
        with reuse.sharing(keys), torch.inference_mode():
            engine._model.generate(**batch, max_new_tokens=1)
        assert reuse.encoded == encoded


def test_the_model_is_left_as_it_was_also_when_generate_fails(load: Load) -> None:
    engine = load("qwen2_vl")
    reuse, base = engine._vision, engine._model.base_model
    assert reuse is not None
    batch, keys = inputs(engine, [ask(A, prompt="a"), ask(A, prompt="b")])

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("in the tower")

    with reuse.sharing(keys):
        assert "get_image_features" in vars(base)
    handle = base.visual.register_forward_pre_hook(fail)
    with pytest.raises(torch.OutOfMemoryError), reuse.sharing(keys):
        engine._model.generate(**batch, max_new_tokens=1)
    handle.remove()
    assert "get_image_features" not in vars(base)
    assert not reuse._features
    requests = [ask(A, prompt="a"), ask(A, prompt="b")]
    assert run(engine, requests) == without_sharing(engine, requests)


def test_two_calls_at_the_same_time_are_refused(load: Load) -> None:
    reuse = load("qwen2_vl")._vision
    assert reuse is not None

    def enter() -> None:
        with reuse.sharing(["x"]):
            pass

    with reuse.sharing(["x"]):
        with pytest.raises(RuntimeError, match="at a time"):
            enter()
        with ThreadPoolExecutor(1) as pool, pytest.raises(RuntimeError, match="at a time"):
            pool.submit(enter).result()
    enter()


@pytest.mark.parametrize("architecture", ["qwen2_vl", "llava_onevision", "internvl"])
def test_keys_that_do_not_fit_the_batch_share_nothing(load: Load, architecture: str) -> None:
    engine = load(architecture)
    reuse = engine._vision
    assert reuse is not None
    batch, keys = inputs(engine, [ask(A, prompt="a"), ask(A, prompt="b"), ask(B, prompt="c")])
    with torch.inference_mode():
        expected = engine._model.generate(**batch, max_new_tokens=4)
        for wrong in ([], keys[:-1], [*keys, "one too many"]):
            with reuse.sharing(wrong):
                assert torch.equal(engine._model.generate(**batch, max_new_tokens=4), expected)
    assert not reuse._features


class TestProbe:
    """Models that break what sharing rests on are found at loading and go without it."""

    def probe(self, engine: HFEngine, caplog: pytest.LogCaptureFixture) -> VisionReuse | None:
        batch, keys = inputs(
            engine, [ask(image, prompt=prompt) for image, prompt in zip((A, B, A), PROMPTS, strict=True)]
        )
        with caplog.at_level(logging.INFO, logger="services.captioner.engines.hf_vision"):
            return VisionReuse.probe(engine._model, batch, keys, name="tiny")

    def altered(self, patch: pytest.MonkeyPatch, engine: HFEngine, alter: Callable[[Any], Any]) -> None:
        """The model, with `alter` applied to what get_image_features answers."""
        kind = type(engine._model.base_model)
        original = kind.get_image_features

        @wraps(original)
        def get_image_features(*args: Any, **kwargs: Any) -> Any:
            return alter(original(*args, **kwargs))

        patch.setattr(kind, "get_image_features", get_image_features)

    def test_good_model(self, load: Load, caplog: pytest.LogCaptureFixture) -> None:
        reuse = self.probe(load("qwen2_vl"), caplog)
        assert reuse is not None
        assert (reuse.encoded, reuse.reused, len(reuse._features)) == (0, 0, 0)

    def test_pictures_that_look_at_one_another(
        self, load: Load, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def look(output: Any) -> Any:
            mean = torch.cat(list(output.pooler_output)).mean(dim=0)
            output.pooler_output = [features + mean for features in output.pooler_output]
            return output

        engine = load("qwen2_vl")
        self.altered(monkeypatch, engine, look)
        assert self.probe(engine, caplog) is None
        assert "differ from pictures encoded alone" in caplog.text

    def test_features_of_all_pictures_in_one_row(
        self, load: Load, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def flatten(output: Any) -> Any:
            output.pooler_output = output.pooler_output.flatten(0, 1)
            return output

        engine = load("internvl")
        self.altered(monkeypatch, engine, flatten)
        assert self.probe(engine, caplog) is None
        assert "cannot be told apart" in caplog.text

    @pytest.mark.parametrize("needed", [True, False])
    def test_model_that_reads_more_than_the_features(
        self, load: Load, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, needed: bool
    ) -> None:
        engine = load("qwen2_vl")
        kind, forward = type(engine._model.base_model), type(engine._model.base_model).forward

        def peek(self: Any, *args: Any, mm_encoder_outputs: Any = None, **kwargs: Any) -> Any:
            if mm_encoder_outputs:
                output = mm_encoder_outputs["image"]
                if needed or output.last_hidden_state is not None:
                    shift = output.last_hidden_state.mean()
                    pooled = [features + shift for features in output.pooler_output]
                    mm_encoder_outputs = {"image": type(output)(pooler_output=pooled)}
            return forward(self, *args, mm_encoder_outputs=mm_encoder_outputs, **kwargs)

        monkeypatch.setattr(kind, "forward", peek)
        assert self.probe(engine, caplog) is None
        assert ("AttributeError" if needed else "depends on more than the features") in caplog.text
        assert "get_image_features" not in vars(engine._model.base_model)

    def test_model_without_the_method(self, caplog: pytest.LogCaptureFixture) -> None:
        model = SimpleNamespace(base_model=SimpleNamespace())
        assert VisionReuse.probe(model, {}, [], name="tiny") is None
        assert "no get_image_features" in caplog.text

    def test_engine_goes_on_without(self, load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
        engine = load("qwen2_vl")
        requests = [ask(A, prompt="a"), ask(A, prompt="b")]
        expected = [engine.finish(raw) for raw in engine.generate([engine.prepare(request) for request in requests])]
        monkeypatch.setattr(VisionReuse, "_difference", lambda *_: "for a test")
        plain = build(engine.name, engine.spec, engine.model_roots)
        plain.load()
        assert isinstance(plain, HFEngine)
        assert plain._vision is None
        assert [plain.finish(raw) for raw in plain.generate([plain.prepare(r) for r in requests])] == expected


def test_keys_name_pixels() -> None:
    assert picture_key(A) == picture_key(A.copy())
    assert picture_key(A) != picture_key(B)
    assert picture_key(Image.new("RGB", (10, 20))) != picture_key(Image.new("RGB", (20, 10)))
    assert picture_key(Image.new("L", (30, 10))) != picture_key(Image.new("RGB", (10, 10)))


def test_keys_of_units() -> None:
    assert unit_keys({"input_ids": torch.zeros(1, 5)}, []) == ()
    pixels, grid = torch.zeros(24, 8), torch.tensor([[1, 4, 4], [1, 2, 4]])
    assert unit_keys({"pixel_values": pixels, "image_grid_thw": grid}, ["a", "b"]) == ("a", "b")
    tiles = torch.zeros(3, 3, 8, 8)
    assert unit_keys({"pixel_values": tiles}, ["a"]) == ("a/0", "a/1", "a/2")
    assert unit_keys({"pixel_values": tiles}, ["a", "b"]) == ("a+b/0", "a+b/1", "a+b/2")
    row = torch.zeros(1, 4, 3, 8, 8)  # all pictures of a prompt together
    assert unit_keys({"pixel_values": row}, ["a"]) == ("a",)
    assert unit_keys({"pixel_values": row}, ["a", "b"]) == ("a+b/0",)
