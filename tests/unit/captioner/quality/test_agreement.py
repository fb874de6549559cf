"""CLIPScore and self-retrieval, against the formulas."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image as Picture

from services.captioner.quality import agreement
from services.captioner.quality.agreement import Agreement, agreements, clip_for_measuring, embed
from shared.clip import embedder, warm
from shared.clip.loading import LoadedClip, encode_image, encode_text, preprocess_uint8
from shared.db.models import Image
from shared.store.disk import DiskStore
from tests.tiny_clip import write_tiny_clip


@pytest.fixture
def clip(tmp_path: Path) -> Iterator[LoadedClip]:
    write_tiny_clip(tmp_path / "tiny")
    yield clip_for_measuring("tiny", tmp_path, [tmp_path])
    warm.forget()


def test_scores_and_ranks_are_the_formulas(clip: LoadedClip, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "_EMBEDDINGS", 4)
    texts = [f"Picture number {i}." for i in range(9)]
    images = torch.nn.functional.normalize(torch.randn(11, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    own = [3, 0, 10, 7, 7, 1, 2, 5, 8]
    found = agreements(clip, images, texts, own)
    cosines = encode_text(clip, [f"A photo depicts {text}" for text in texts]) @ images.T
    for row, index, each in zip(cosines, own, found, strict=True):
        assert each.clip_score == pytest.approx(2.5 * max(row[index].item(), 0), abs=1e-4)
        assert each.rank == 1 + (row > row[index]).sum()
    assert len({each.rank for each in found}) > 3
    assert min(each.clip_score for each in found) == 0, "a negative cosine scores nothing"


def test_equal_pictures_do_not_outrank_each_other(clip: LoadedClip) -> None:
    images = torch.nn.functional.normalize(torch.ones(5, 16), dim=1)
    assert [each.rank for each in agreements(clip, images, ["A cat.", "A dog."], [4, 0])] == [1, 1]


@pytest.mark.parametrize(
    ("rank", "images", "low"),
    [(1, 1, False), (2, 2, True), (2, 3, False), (3, 3, True), (50, 100, False), (51, 100, True)],
)
def test_low_means_that_most_others_suit_better(rank: int, images: int, low: bool) -> None:
    assert Agreement(0.5, rank).low(images) is low


def test_pictures_are_embedded_in_their_order(
    clip: LoadedClip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedder, "_IMAGES", 2)
    store = DiskStore(tmp_path / "store")
    rows, pixels = [], []
    for shade in range(5):
        picture = Picture.new("RGB", (40, 30), (40 * shade, 200 - 40 * shade, 90))
        picture.save(tmp_path / "a.png")
        rows.append(Image(sha256=store.put_blob((tmp_path / "a.png").read_bytes())))
        pixels.append(preprocess_uint8(picture, clip))
    steps: list[int] = []
    torch.testing.assert_close(embed(store, rows, clip, steps.append), encode_image(clip, torch.stack(pixels)))
    assert steps == [0, 2, 4]
