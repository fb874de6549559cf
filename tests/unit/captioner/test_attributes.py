"""The `attributes` engine on pictures drawn here, so that what is true of them is known."""

import random
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from services.captioner.attributes import colours, phrasing, tag
from services.captioner.attributes.measure import Measurement, measure
from services.captioner.engines import attributes, build
from services.captioner.engines.attributes import AttributesEngine
from services.captioner.engines.base import CaptionRequest
from services.captioner.settings import EngineSpec
from shared.errors import InvalidInput

Box = tuple[int, int, int, int]


def drawn(kind: str, box: Box, color: str, ground: str = "white", size: tuple[int, int] = (200, 200)) -> Image.Image:
    image = Image.new("RGB", size, ground)
    getattr(ImageDraw.Draw(image), kind)(box, fill=color)
    return image


def noise(seed: int, size: tuple[int, int] = (160, 120), low: int = 0, high: int = 256, cell: int = 1) -> Image.Image:
    values = np.random.default_rng(seed).integers(low, high, (size[1] // cell, size[0] // cell, 3), dtype=np.uint8)
    return Image.fromarray(values).resize(size, Image.Resampling.NEAREST)


def stripes(width: int = 10) -> Image.Image:
    image = Image.new("RGB", (160, 160), "white")
    for left in range(0, 160, 2 * width):
        ImageDraw.Draw(image).rectangle((left, 0, left + width - 1, 159), fill="black")
    return image


def say(m: Measurement, characteristic: str, name: str = "thing", kind: str | None = None, seed: int = 0) -> str:
    return phrasing.phrase(m, name, characteristic, kind, 50, 60, random.Random(seed))


@pytest.fixture(scope="module")
def engine() -> AttributesEngine:
    loaded = build("attributes", EngineSpec())
    assert isinstance(loaded, AttributesEngine)
    loaded.load()
    return loaded


def caption(engine: AttributesEngine, image: Image.Image, prompt: str = "Describe it.", **options: Any) -> str:
    seed = options.pop("seed", None)
    request = CaptionRequest((image,), prompt, seed=seed, metadata=options)
    return engine.finish(engine.generate([engine.prepare(request)])[0]).text


def test_lab_of_known_colors() -> None:
    rgb = np.array([[255, 255, 255], [0, 0, 0], [255, 0, 0], [0, 0, 255]], dtype=np.uint8)
    expected = [[100, 0, 0], [0, 0, 0], [53.24, 80.09, 67.20], [32.30, 79.19, -107.86]]
    assert np.abs(colours.to_lab(rgb) - np.array(expected)).max() < 0.05


@pytest.mark.parametrize(
    ("rgb", "name"),
    [
        ((250, 250, 250), "white"),
        ((5, 5, 5), "black"),
        ((127, 127, 127), "gray"),
        ((200, 20, 20), "red"),
        ((25, 30, 90), "navy blue"),
        ((110, 70, 40), "brown"),
        ((250, 225, 30), "yellow"),
        ((40, 150, 50), "green"),
        ((245, 130, 20), "orange"),
        ((245, 160, 190), "pink"),
    ],
)
def test_color_names(rgb: tuple[int, int, int], name: str) -> None:
    assert colours.name_of(colours.to_lab(np.array(rgb, dtype=np.uint8))) == name


def test_disc_on_white() -> None:
    m = measure(drawn("ellipse", (50, 50, 150, 150), "#d81e1e"))
    assert (m.region, m.subject[0][0], m.background[0][0]) == ("plain", "red", "white")
    assert m.shape.aspect == pytest.approx(1, abs=0.08)
    assert m.shape.area == pytest.approx(np.pi / 16, rel=0.15)
    assert m.shape.oval > 0.9
    for seed in range(6):
        assert re.search(r"(?i)red.* plain white|red.* even white|plain white.* red", say(m, "visual", seed=seed))
        assert "round outline" in say(m, "shape", seed=seed)
        assert re.search(r"(?i)smooth, flat areas|plain, even surfaces", say(m, "texture", seed=seed))


@pytest.mark.parametrize(
    ("box", "words"),
    [
        ((20, 80, 180, 120), "long and low|far wider than tall"),
        ((85, 20, 115, 180), "tall and narrow"),
        ((50, 50, 150, 150), "about as wide as tall|equally wide and tall"),
        ((40, 60, 160, 120), "about twice as wide as tall"),
    ],
)
def test_proportions_of_blocks(box: Box, words: str) -> None:
    text = say(measure(drawn("rectangle", box, "#2e9e3a", "#f7e018")), "shape")
    assert re.search(f"(?i){words}", text)
    assert re.search("blocky|boxy", text)


def test_triangle_branches_and_place() -> None:
    triangle = Image.new("RGB", (200, 200), "white")
    ImageDraw.Draw(triangle).polygon([(100, 30), (30, 170), (170, 170)], fill="blue")
    text = say(measure(triangle), "shape")
    assert re.search("triangular|like a triangle", text)
    assert "widest near the bottom" in text
    cross = drawn("rectangle", (92, 10, 108, 190), "black")
    ImageDraw.Draw(cross).rectangle((10, 92, 190, 108), fill="black")
    assert re.search("branching|gaps|notches|stick out", say(measure(cross), "shape"))
    corner = say(measure(drawn("ellipse", (10, 10, 60, 60), "black")), "shape")
    assert re.search("(?i)left of center and toward the top", corner)


def test_thin_lines_belong_to_a_drawing_and_keep_their_color() -> None:
    image = Image.new("RGB", (200, 200), "white")
    ImageDraw.Draw(image).ellipse((30, 30, 170, 170), outline="black", width=3)
    m = measure(image)
    assert m.region == "plain"
    assert {name for name, _ in m.subject} <= {"white", "black"}


def test_subject_on_a_busy_background_is_found_and_described_apart() -> None:
    image = noise(1, low=20, high=110, cell=4)
    ImageDraw.Draw(image).ellipse((45, 25, 115, 95), fill="#f58216")
    m = measure(image)
    assert m.region == "separated"
    assert m.subject[0][0] == "orange"
    assert m.shape.area == pytest.approx(np.pi * 35 * 35 / (160 * 120), rel=0.25)
    assert "orange" in say(m, "visual")


@pytest.mark.parametrize("image", [noise(3), noise(4, cell=8), stripes()])
def test_without_a_separable_subject_only_the_picture_is_described(image: Image.Image) -> None:
    m = measure(image)
    assert m.region == "whole"
    shape = say(m, "shape")
    assert re.search("without a clear outline|contour merging", shape)
    assert not re.search(r"wider than|taller than|\bround\b|covers", shape)


def test_stripes_have_a_direction_and_a_period() -> None:
    m = measure(stripes())
    assert m.surface.period == pytest.approx(20 / 160, rel=0.15)
    assert m.surface.coherence > 0.9
    text = say(m, "texture")
    assert "lines run mainly vertically" in text
    assert "repeats at regular intervals" in text
    across = say(measure(stripes().transpose(Image.Transpose.ROTATE_90)), "texture")
    assert "lines run mainly horizontally" in across
    assert measure(noise(5, cell=2)).surface.period == 0


@pytest.mark.parametrize("size", [(1, 1), (2, 300), (300, 3), (8, 8)])
def test_tiny_and_extreme_pictures_are_described_too(size: tuple[int, int]) -> None:
    assert say(measure(Image.new("RGB", size, "teal")), "visual")


def test_a_tag_is_added_unless_the_label_says_it() -> None:
    m = measure(noise(3))
    assert "dog" in say(m, "visual", "beagle", "dog")
    assert "dog" in say(m, "shape", "beagle", "dog")
    assert "dog" not in say(m, "texture", "beagle", "dog")
    assert "dog" not in say(m, "visual", "beagle").replace("beagle", "")
    assert say(m, "visual", "guard dog", "dog").count("dog") == 1


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10_000),
    cell=st.sampled_from([1, 3, 8, 20]),
    plain=st.booleans(),
    name=st.sampled_from(["cat", "bengal", "american staffordshire terrier", "No entry for vehicles over 3.5 tons"]),
    characteristic=st.sampled_from(["visual", "shape", "texture", "color", "context", "petals"]),
    words=st.integers(5, 60),
    kind=st.sampled_from([None, "big cat"]),
)
def test_captions_keep_to_the_budget(
    seed: int, cell: int, plain: bool, name: str, characteristic: str, words: int, kind: str | None
) -> None:
    image = noise(seed, cell=cell)
    if plain:
        canvas = Image.new("RGB", (260, 220), "white")
        canvas.paste(image, (50, 50))
        image = canvas
    text = phrasing.phrase(measure(image), name, characteristic, kind, words, 60, random.Random(seed))
    assert len(text.split()) <= words
    tokens = int((open_clip.get_tokenizer("ViT-B-32")([text]) != 0).sum()) - 2
    assert tokens <= 64  # 60 by estimate
    assert text[0].isupper() or text[0].isdigit()
    assert text.endswith(".")
    assert not re.search(r"(?i)^the (image|picture|photo)|\bNone\b|  ", text)


def test_captions_repeat_exactly_and_vary_by_picture_and_seed(engine: AttributesEngine) -> None:
    disc = drawn("ellipse", (50, 50, 150, 150), "red")
    again = Image.frombytes("RGB", disc.size, disc.tobytes())
    first = caption(engine, disc, class_name="ball", characteristic="visual")
    assert caption(engine, again, class_name="ball", characteristic="visual") == first
    assert len({caption(engine, disc, class_name="ball", characteristic="visual", seed=s) for s in range(8)}) > 2
    assert (
        len({caption(engine, disc, class_name="ball", characteristic=c) for c in ("visual", "shape", "texture")}) == 3
    )
    assert engine.revision == "attributes-1+efficientnet-lite0"


def test_characteristic_and_name_without_metadata(engine: AttributesEngine) -> None:
    disc = drawn("ellipse", (50, 50, 150, 150), "red")
    text = caption(engine, disc, "describe its primary shape characteristics based on the photo")
    assert "subject" in text
    assert "round outline" in text
    assert "subject" in caption(engine, disc, "What is this?", class_name="  ")


def test_three_prompts_of_one_picture_are_measured_once(
    engine: AttributesEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[tuple[int, int]] = []

    def counting(image: Image.Image) -> Measurement:
        measured.append(image.size)
        return measure(image)

    monkeypatch.setattr(attributes, "measure", counting)
    pictures = [drawn("ellipse", (40, 40, 90 + 10 * i, 120), "purple") for i in range(2)]
    requests = [
        CaptionRequest((picture.copy(),), "", metadata={"class_name": f"c{i}", "characteristic": c})
        for c in ("visual", "shape", "texture")
        for i, picture in enumerate(pictures)
    ]
    raw = engine.generate([engine.prepare(request) for request in requests])
    texts = [engine.finish(item).text for item in raw]
    assert len(measured) == 2
    assert [re.findall(r"\bc\d\b", text)[0] for text in texts] == ["c0", "c1"] * 3  # in the order asked
    engine.generate([engine.prepare(requests[0])])
    assert len(measured) == 2  # nor again in the next batch


@pytest.mark.parametrize("words", ["", "ten", "-5", "4", "201", "1e3"])
def test_words_out_of_range_are_refused(engine: AttributesEngine, words: str) -> None:
    with pytest.raises(InvalidInput, match="from 5 to 200"):
        caption(engine, noise(1), words=words)


@pytest.mark.parametrize("count", [0, 2])
def test_one_picture_per_request(engine: AttributesEngine, count: int) -> None:
    with pytest.raises(InvalidInput, match="one picture per request"):
        engine.prepare(CaptionRequest((noise(1),) * count, ""))


def test_the_classifier_is_not_believed_on_what_it_never_learned(engine: AttributesEngine) -> None:
    pictures = [
        drawn("ellipse", (50, 50, 150, 150), "red"),
        drawn("rectangle", (20, 80, 180, 120), "green", "yellow"),
        stripes(),
        noise(1),
        Image.new("RGB", (64, 64), "white"),
    ]
    assert engine._tagger.tag(pictures) == [None] * 5
    assert engine._tagger.tag([]) == []


def test_the_gate_needs_both_views_and_its_threshold(engine: AttributesEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    tagger = engine._tagger
    dog, drum, pinwheel = (tagger.names.index(name) for name in ("dog", "drum", "pinwheel"))
    answers = iter(
        [
            [(dog, 0.9), (dog, 0.9), (drum, 0.9), (drum, 0.8), (pinwheel, 1.0), (dog, tag.KIND_THRESHOLD - 0.01)],
            [(dog, 0.9), (dog, 0.3), (drum, 0.86)],
        ]
    )

    def probabilities(views: Sequence[Image.Image]) -> torch.Tensor:
        rows = torch.zeros(len(views), len(tagger.names))
        for row, (name, value) in zip(rows, next(answers), strict=True):
            row[name] = value
        return rows

    monkeypatch.setattr(tagger, "probabilities", probabilities)
    assert tagger.tag([noise(1)] * 6) == ["dog", None, "drum", None, None, None]


def test_kinds_do_not_overlap_and_every_banned_name_exists(engine: AttributesEngine) -> None:
    spans = [index for ranges in tag.KINDS.values() for a, b in ranges for index in range(a, b + 1)]
    assert len(spans) == len(set(spans))
    assert set(engine._tagger.names) >= tag.NEVER
    assert torch.equal(engine._tagger.sums.sum(0), torch.ones(1000))
