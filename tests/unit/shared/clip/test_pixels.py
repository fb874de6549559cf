"""shared/clip/pixels.py and shared/clip/embedder.py on real files."""

import io
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image as Picture

from shared.clip import embedder, pixels
from shared.clip.embedder import Embedder
from shared.clip.loading import LoadedClip, encode_image, encode_text, load_clip, normalise, preprocess_uint8
from shared.clip.pixels import Pixels, load_pixels
from shared.clip.projection import last_projection
from shared.db.models import Image
from shared.errors import NotFound
from shared.row_cache import RowCache
from shared.store.disk import DiskStore
from shared.store.storage import Store
from tests.tiny_clip import IMAGE_SIZE, write_tiny_clip

BYTES = 3 * IMAGE_SIZE**2


def picture(seed: int) -> Picture.Image:
    noise = torch.randint(0, 256, (6, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return Picture.fromarray(noise.numpy()).resize((48, 40))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> LoadedClip:
    folder = write_tiny_clip(tmp_path_factory.mktemp("models") / "tiny")
    return load_clip(str(folder), folder.parent, [folder.parent])


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return DiskStore(tmp_path / "store")


@pytest.fixture
def images(store: Store) -> list[Image]:
    rows = []
    for seed in range(12):
        out = io.BytesIO()
        picture(seed % 11).save(out, "PNG")  # the first and the last are equal
        rows.append(Image(sha256=store.put_blob(out.getvalue())))
    return rows


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[RowCache]:
    cache = RowCache(tmp_path / "rows", 64 << 20)
    yield cache
    cache.close()


@pytest.fixture
def expected(tiny: LoadedClip) -> torch.Tensor:
    return torch.stack([preprocess_uint8(picture(seed % 11), tiny) for seed in range(12)])


def forget(store: Store, images: list[Image]) -> None:
    for image in images:
        store.delete(Store.blob_key(image.sha256))


def quiet(_: int) -> None:
    return None


def test_pixels_are_the_models_preprocessing_and_are_decoded_once(
    cache: RowCache, store: Store, images: list[Image], tiny: LoadedClip, expected: torch.Tensor, monkeypatch
) -> None:
    monkeypatch.setattr(pixels, "CHUNK", 5)
    steps: list[int] = []
    first = load_pixels(cache, store, images, tiny, steps.append)
    assert torch.equal(first, expected)
    assert steps == [0, 5, 10]
    forget(store, images)
    assert torch.equal(load_pixels(cache, store, images[::-1], tiny, steps.append), expected.flip(0))


def test_without_a_cache_or_with_a_lost_row_images_are_decoded(
    cache: RowCache, store: Store, images: list[Image], tiny: LoadedClip, expected: torch.Tensor
) -> None:
    assert torch.equal(load_pixels(None, store, images, tiny, quiet), expected)
    load_pixels(cache, store, images[:4], tiny, quiet)
    space = f"pixels-{pixels._VERSION}-{tiny.preprocessing_key}"
    cache.put_many(space, {images[2].sha256: b"too short"})
    assert torch.equal(load_pixels(cache, store, images, tiny, quiet), expected)


def test_models_that_see_other_pixels_do_not_share_rows(
    cache: RowCache, store: Store, images: list[Image], tiny: LoadedClip, tmp_path: Path
) -> None:
    load_pixels(cache, store, images, tiny, quiet)
    folder = write_tiny_clip(tmp_path / "squash")
    config = folder / "open_clip_config.json"
    config.write_text(config.read_text().replace("shortest", "squash"))
    other = load_clip(str(folder), tmp_path, [tmp_path])
    assert other.preprocessing_key != tiny.preprocessing_key
    assert not torch.equal(
        load_pixels(cache, store, images, other, quiet), load_pixels(cache, store, images, tiny, quiet)
    )


def test_what_does_not_fit_into_memory_is_read_by_the_batch(
    cache: RowCache, store: Store, images: list[Image], tiny: LoadedClip, expected: torch.Tensor, monkeypatch
) -> None:
    monkeypatch.setattr(pixels, "CHUNK", 5)
    steps: list[int] = []
    rows = load_pixels(cache, store, images, tiny, steps.append, in_memory_bytes=11 * BYTES)
    assert isinstance(rows, Pixels)
    assert steps == [0, 5, 10]
    assert (len(rows), rows.shape, rows.dtype) == (12, (12, 3, IMAGE_SIZE, IMAGE_SIZE), torch.uint8)
    forget(store, images)
    picked = torch.tensor([3, 0, 3, 11])
    assert torch.equal(rows[picked], expected[picked])
    assert torch.equal(rows[4:9], expected[4:9])
    assert rows[:0].shape == (0, 3, IMAGE_SIZE, IMAGE_SIZE)
    torch.testing.assert_close(encode_image(tiny, rows, batch=5), encode_image(tiny, expected))


def test_what_the_cache_has_lost_is_decoded_again(
    store: Store, images: list[Image], tiny: LoadedClip, expected: torch.Tensor, tmp_path: Path
) -> None:
    for cache in (None, RowCache(tmp_path / "none", 0)):
        rows = load_pixels(cache, store, images, tiny, quiet, in_memory_bytes=0)
        assert torch.equal(rows[torch.arange(12)], expected)
    forget(store, images[:1])
    with pytest.raises(NotFound):
        rows[:1]


def test_a_raise_in_on_chunk_stops_the_loading(
    cache: RowCache, store: Store, images: list[Image], tiny: LoadedClip
) -> None:
    def stop(_: int) -> None:
        raise KeyboardInterrupt

    for in_memory in (0, 1 << 30):
        with pytest.raises(KeyboardInterrupt):
            load_pixels(cache, store, images, tiny, stop, in_memory_bytes=in_memory)


def test_embeddings_are_the_models_and_computed_once(
    cache: RowCache, store: Store, images: list[Image], tiny: LoadedClip, expected: torch.Tensor, monkeypatch
) -> None:
    monkeypatch.setattr(embedder, "_IMAGES", 5)
    steps: list[int] = []
    found = Embedder(tiny, cache).images(store, images, steps.append)
    torch.testing.assert_close(found, encode_image(tiny, expected), atol=1e-6, rtol=0)
    assert steps == [0, 5, 10]
    raw = Embedder(tiny, cache).unprojected(store, images, quiet)
    torch.testing.assert_close(F.normalize(last_projection(tiny).project(raw), dim=-1), found, atol=1e-5, rtol=0)
    torch.testing.assert_close(raw, last_projection(tiny).unprojected(tiny.model, normalise(expected, tiny)))
    texts = ["a cat", "a dog on a rug", "a cat"]
    words = Embedder(tiny, cache).texts(texts)
    torch.testing.assert_close(words, encode_text(tiny, texts), atol=1e-6, rtol=0)

    def never(*_: object, **__: object) -> torch.Tensor:
        raise AssertionError("computed twice")

    for name in ("encode_image", "encode_tokens", "load_pixels"):
        monkeypatch.setattr(embedder, name, never)
    again = Embedder(tiny, cache)
    assert torch.equal(again.images(store, images[::-1], quiet), found.flip(0))
    assert torch.equal(again.unprojected(store, images, quiet), raw)
    assert torch.equal(again.texts(texts[::-1]), words.flip(0))


def test_another_models_embeddings_are_its_own(
    cache: RowCache, store: Store, images: list[Image], tiny: LoadedClip, tmp_path: Path
) -> None:
    folder = write_tiny_clip(tmp_path / "other", seed=1)
    other = load_clip(str(folder), tmp_path, [tmp_path])
    assert other.revision != tiny.revision
    assert other.revision == load_clip(str(folder), tmp_path, [tmp_path]).revision
    assert len(tiny.revision) == 32
    ours, theirs = (Embedder(clip, cache).images(store, images, quiet) for clip in (tiny, other))
    assert not torch.allclose(ours, theirs, atol=1e-2)
    assert not torch.allclose(Embedder(tiny, cache).texts(["a"]), Embedder(other, cache).texts(["a"]), atol=1e-2)


def test_embeddings_are_computed_anew_once_images_become_other_pixels(
    cache: RowCache, store: Store, tiny: LoadedClip, images: list[Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    Embedder(tiny, cache).images(store, images, quiet)
    computed: list[int] = []
    monkeypatch.setattr(
        "shared.clip.embedder.encode_image", lambda clip, pixels: computed.append(len(pixels)) or pixels
    )
    Embedder(tiny, cache).images(store, images, quiet)
    assert not computed
    monkeypatch.setattr("shared.clip.pixels._VERSION", 99)
    with pytest.raises((RuntimeError, ValueError)):  # what stands in gives pixels, which are no embeddings
        Embedder(tiny, cache).images(store, images, quiet)
    assert computed


def test_class_means_count_a_text_as_often_as_it_occurs(tiny: LoadedClip) -> None:
    texts = [["a cat", "a cat", "a tabby"], ["a dog"]]
    rows = encode_text(tiny, texts[0])
    means = Embedder(tiny, None).class_means(texts)
    torch.testing.assert_close(means[0], F.normalize(rows.mean(0), dim=-1))
    torch.testing.assert_close(means[1], encode_text(tiny, texts[1])[0])


def test_no_images_give_no_rows(cache: RowCache, store: Store, tiny: LoadedClip) -> None:
    assert Embedder(tiny, cache).images(store, [], quiet).shape == (0, 16)
    assert Embedder(tiny, cache).unprojected(store, [], quiet).shape == (0, 32)
    assert load_pixels(cache, store, [], tiny, quiet).shape == (0, 3, IMAGE_SIZE, IMAGE_SIZE)
