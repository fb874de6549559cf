"""shared/clip: loading.py, local_dir.py, starter.py. No network; the starter is really built, once per version of its
source."""

import hashlib
import json
import logging
import math
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from shared.clip import loading, local_dir, starter
from shared.clip.loading import (
    encode_image,
    encode_text,
    ensure_starter,
    load_clip,
    normalise,
    preprocess_uint8,
    save_clip,
    trim_padding,
)
from shared.errors import CaptuneError, InvalidInput, Unavailable

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 16, "head_width": 8, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
PREPROCESS = {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7], "interpolation": "bilinear", "resize_mode": "squash"}


@pytest.fixture(scope="module")
def cache_dir(request: pytest.FixtureRequest) -> Path:
    source = hashlib.sha256(Path(starter.__file__).read_bytes()).hexdigest()[:12]
    assert request.config.cache is not None
    return request.config.cache.mkdir(f"starter-{source}")


@pytest.fixture(scope="module")
def started(cache_dir: Path) -> loading.LoadedClip:
    return load_clip("starter", cache_dir)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    folder = tmp_path / "models" / "tiny"
    torch.manual_seed(0)
    config = {"model_cfg": TINY, "preprocess_cfg": PREPROCESS}
    local_dir.write(folder, config, open_clip.CLIP(**TINY).state_dict(), None)
    return folder


def picture(size: tuple[int, int] = (90, 60)) -> Image.Image:
    generator = torch.Generator().manual_seed(1)
    noise = torch.randint(0, 256, (size[1] // 10, size[0] // 10, 3), dtype=torch.uint8, generator=generator)
    return Image.fromarray(noise.numpy()).resize(size, Image.Resampling.BICUBIC)


def test_starter_maps_the_classifiers_directions_onto_its_class_names(started: loading.LoadedClip) -> None:
    weight = starter.load_efficientnet().get_parameter("classifier.weight").detach()
    names = encode_text(started, [f"a photo of a {name}" for name in starter.imagenet_names()[::10]])
    head = started.model.visual.head
    images = torch.nn.functional.normalize((weight - weight.mean(0)) @ head.proj.weight.T + head.proj.bias, dim=-1)
    hits = (images[::10] @ names.T).argmax(1) == torch.arange(100)
    assert hits.float().mean() > 0.9


def test_starter_has_the_scale_of_its_cosines_and_states_its_activation(started: loading.LoadedClip) -> None:
    assert math.isclose(started.model.logit_scale.exp().item(), 1 / 0.07, rel_tol=1e-4)
    assert started.config["model_cfg"]["quick_gelu"] is False
    assert (started.name, started.image_size, started.mean, started.std) == ("starter", 224, (0.5,) * 3, (0.5,) * 3)
    assert not started.model.training


def test_text_embeddings_keep_their_order_and_do_not_depend_on_the_batch(started: loading.LoadedClip) -> None:
    texts = ["a photo of a truck.", "a dog", "a photo of a small brown puppy that lies on a green lawn in the sun."]
    together, alone = encode_text(started, texts), torch.cat([encode_text(started, [t]) for t in texts])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(3))
    assert together[1] @ together[2] > together[1] @ together[0]
    full = started.model.encode_text(started.tokenizer(texts), normalize=True)  # padded to 77
    torch.testing.assert_close(together, full.detach(), atol=1e-5, rtol=0)


def test_preprocessing_is_the_models_own(started: loading.LoadedClip, cache_dir: Path) -> None:
    folder = ensure_starter(cache_dir)
    _, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}", text_cfg=local_dir.read(folder)[1])
    image = picture((300, 200))
    pixels = preprocess_uint8(image, started)
    assert pixels.dtype == torch.uint8
    torch.testing.assert_close(normalise(pixels[None], started)[0], transform(image))
    rows = encode_image(started, torch.stack([pixels, pixels.flip(2), pixels]), batch=2)
    assert rows.shape == (3, 384)
    torch.testing.assert_close(rows[0], rows[2], atol=1e-5, rtol=0)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(3))
    assert encode_image(started, torch.empty(0, 3, 224, 224, dtype=torch.uint8)).shape == (0, 384)


def test_saved_starter_is_loaded_by_plain_open_clip_wherever_it_is_moved(
    started: loading.LoadedClip, tmp_path: Path
) -> None:
    state = {key: value.clone() for key, value in started.model.state_dict().items()}
    state["logit_scale"] += 1
    save_clip(started, state, tmp_path / "first")
    moved = tmp_path / "elsewhere" / "moved here"
    moved.parent.mkdir()
    shutil.move(tmp_path / "first", moved)
    (tmp_path / "cwd").mkdir()
    script = """
import socket, sys
def refuse(*_): raise OSError("no network in this test")
socket.socket.connect = socket.getaddrinfo = refuse
import open_clip, torch
name = "local-dir:" + sys.argv[1]
model, _, transform = open_clip.create_model_and_transforms(name)
row = model.eval().encode_text(open_clip.get_tokenizer(name)(["a photo of a dog."]), normalize=True)
print(float(model.logit_scale), *row[0, :3].tolist())
"""
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "HF_HUB_OFFLINE")}
    command = [sys.executable, "-c", script, str(moved)]
    done = subprocess.run(command, cwd=tmp_path / "cwd", env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    scale, *row = map(float, done.stdout.split())
    assert scale == pytest.approx(starter.LOGIT_SCALE + 1, abs=1e-5)
    assert row == pytest.approx(encode_text(started, ["a photo of a dog."])[0, :3].tolist(), abs=1e-5)


def test_our_loader_needs_neither_the_recorded_path_nor_a_hub(
    started: loading.LoadedClip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_clip(started, started.model.state_dict(), tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / local_dir.CONFIG).read_text())
    config["model_cfg"]["text_cfg"]["hf_model_name"] = "/nowhere/minilm"
    (tmp_path / "saved" / local_dir.CONFIG).write_text(json.dumps(config))
    monkeypatch.setattr("socket.socket.connect", None)
    loaded = load_clip(str(tmp_path / "saved"), tmp_path / "cache", [tmp_path])
    assert torch.equal(encode_text(loaded, ["a cat"]), encode_text(started, ["a cat"]))
    assert loaded.config["model_cfg"]["text_cfg"]["hf_model_name"] == "/nowhere/minilm"  # written on as it was


def test_processes_that_start_together_build_the_starter_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / f"starter-{starter.STARTER_VERSION}.tmp-crashed").mkdir()
    built: list[Path] = []

    def slow_build(directory: Path) -> None:
        built.append(directory)
        (directory / local_dir.CONFIG).write_text("half")
        assert not (tmp_path / f"starter-{starter.STARTER_VERSION}").exists()
        time.sleep(0.2)
        (directory / local_dir.CONFIG).write_text("whole")

    monkeypatch.setattr(starter, "_build", slow_build)
    seen: list[str] = []
    # flock belongs to the open file, so threads exclude one another as processes do
    threads = [
        threading.Thread(target=lambda: seen.append((ensure_starter(tmp_path) / local_dir.CONFIG).read_text()))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert (len(built), seen) == (1, ["whole"] * 4)
    assert not list(tmp_path.glob("*.tmp-*"))


def test_a_failed_build_leaves_nothing_that_counts_as_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starter, "MINILM_SHA256", "0" * 64)
    with pytest.raises(Unavailable, match="is not the file the starter is built from"):
        ensure_starter(tmp_path)
    assert not (tmp_path / f"starter-{starter.STARTER_VERSION}").exists()


def test_local_directory_round_trip(tiny: Path, tmp_path: Path) -> None:
    loaded = load_clip("tiny", tmp_path, [tiny.parent])
    assert (loaded.image_size, loaded.mean, loaded.resize_mode) == (32, (0.1, 0.2, 0.3), "squash")
    assert (loaded.tokenizer_files, loaded.name) == (None, str(tiny))
    tokens = loaded.tokenizer(["a", "b c"])
    assert trim_padding(loaded.model, tokens).shape == (2, 4), "a causal tower: up to the last end token"
    save_clip(loaded, loaded.model.state_dict(), tmp_path / "models" / "again")
    again = load_clip(f"local-dir:{tmp_path / 'models' / 'again'}", tmp_path, [tiny.parent])
    assert again.config == {**loaded.config, "model_cfg": {**TINY, "quick_gelu": False}}
    pixels = preprocess_uint8(picture(), loaded)[None]
    assert torch.equal(encode_image(again, pixels), encode_image(loaded, pixels))


def test_local_directory_outside_the_roots_is_refused(tiny: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "link").symlink_to(tiny)
    for name, roots in [
        (str(tiny), []),
        (str(tiny), [other]),
        (str(other / "link"), [other]),
        (str(other / ".." / "models" / "tiny"), [other]),
        ("local-dir:../models/tiny", [other]),
    ]:
        with pytest.raises(InvalidInput, match="not below any of the directories") as caught:
            load_clip(name, tmp_path, roots)
        assert caught.value.code == "model_not_allowed"
    inside = other / "copy"
    shutil.copytree(tiny, inside)
    (inside / local_dir.WEIGHTS).unlink()
    (inside / local_dir.WEIGHTS).symlink_to(tiny / local_dir.WEIGHTS)
    with pytest.raises(InvalidInput, match="a link that leads out"):
        load_clip(str(inside), tmp_path, [other])


def edit(folder: Path, change: dict[str, Any]) -> None:
    config = json.loads((folder / local_dir.CONFIG).read_text())
    config["model_cfg"]["text_cfg"].update(change)
    (folder / local_dir.CONFIG).write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: shutil.rmtree(folder), "no such directory"),
        (lambda folder: (folder / local_dir.CONFIG).unlink(), "open_clip_config.json is missing"),
        (lambda folder: (folder / local_dir.CONFIG).write_text("{"), "not an open_clip config"),
        (lambda folder: (folder / local_dir.CONFIG).write_text("[]"), "not an open_clip config"),
        (lambda folder: edit(folder, {"tokenizer_kwargs": {"trust_remote_code": True}}), "never allowed"),
        (lambda folder: edit(folder, {"tokenizer_kwargs": {"gguf_file": "x"}}), "has 'gguf_file'; it may have clean, "),
        (lambda folder: edit(folder, {"tokenizer_kwargs": ["clean"]}), "tokenizer_kwargs must be an object"),
        (lambda folder: edit(folder, {"tokenizer_kwargs": None}), "tokenizer_kwargs must be an object"),
        (lambda folder: (folder / local_dir.WEIGHTS).rename(folder / "pytorch_model.bin"), "convert to safetensors"),
        (lambda folder: (folder / local_dir.WEIGHTS).write_bytes(b"not safetensors"), "can't be loaded"),
        (lambda folder: edit(folder, {"x": json.loads("[" * 800 + "]" * 800)}), "not an open_clip config"),
        (lambda folder: edit(folder, {"layers": 2}), "Missing key"),
        (lambda folder: edit(folder, {"no_such_option": 1}), "no_such_option"),
    ],
)
def test_broken_local_directory_is_said_to_be_broken(tiny: Path, tmp_path: Path, spoil: Any, words: str) -> None:
    spoil(tiny)
    with pytest.raises(InvalidInput, match=words) as caught:
        load_clip(str(tiny), tmp_path, [tmp_path])
    assert (caught.value.code, caught.value.param) == ("bad_model", "model")
    assert str(tmp_path) not in caught.value.message


def test_where_a_broken_directory_lies_only_the_log_says(
    tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    edit(tiny, {"hf_tokenizer_name": "x"})
    with caplog.at_level(logging.INFO, "shared.clip"), pytest.raises(InvalidInput, match="'tiny' can't be") as caught:
        load_clip("tiny", tmp_path / "cache", [tiny.parent])
    assert str(tmp_path) not in caught.value.message
    (record,) = [record for record in caplog.records if str(tiny) in record.getMessage()]
    assert record.exc_info is not None
    caplog.clear()
    with caplog.at_level(logging.INFO, "shared.clip"), pytest.raises(InvalidInput) as caught:
        load_clip("/etc", tmp_path / "cache", [tiny.parent])
    assert "CAPTUNE_MODEL_ROOTS" in caught.value.message
    assert str(tiny.parent) in caplog.text


def test_tokenizers_have_the_options_of_open_clips_own_configs() -> None:
    configs = [open_clip.get_model_config(name)["text_cfg"] for name in open_clip.list_models()]
    assert {key for config in configs for key in config.get("tokenizer_kwargs", {})} == set(local_dir.TOKENIZER_OPTIONS)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("ViT-B-23/openai", "Did you mean .*ViT-B-32"),
        ("ViT-B-32", "names an architecture without weights. Name both: ViT-B-32/openai"),
        ("ViT-B-32/opanai", "Did you mean ViT-B-32/openai"),
        ("ViT-B-32//etc/passwd", "open_clip knows no weights"),
        ("hf-hub:someone/something", "Use 'starter'"),
        ("", "No model is called ''"),
    ],
)
def test_unknown_names(name: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=words) as caught:
        load_clip(name, tmp_path)
    assert caught.value.code == "unknown_model"


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An architecture `Tiny` with weights `openai` as open_clip publishes them; only the download is a stand-in."""
    weights = tmp_path / "download.safetensors"
    torch.manual_seed(0)
    save_file(dict(open_clip.CLIP(**TINY).state_dict()), weights)
    for arch, quick in (("Tiny", False), ("Tiny-quickgelu", True)):
        monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, arch, {**TINY, **({"quick_gelu": True} if quick else {})})
        entry = {"openai": {"url": "", "hf_hub": "", "quick_gelu": True, "mean": (0.1, 0.2, 0.3)}}
        monkeypatch.setitem(open_clip.pretrained._PRETRAINED, arch, entry)
    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *_, **__: str(weights))
    return weights


def test_openai_weights_get_quick_gelu_and_the_checkpoint_says_so(
    published: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "shared.clip.loading"):
        loaded = load_clip("Tiny/openai", tmp_path)
    assert (loaded.name, loaded.config["model_cfg"]["quick_gelu"]) == ("Tiny-quickgelu/openai", True)
    assert "QuickGELU" in caplog.text
    save_clip(loaded, loaded.model.state_dict(), tmp_path / "saved")
    again = load_clip(str(tmp_path / "saved"), tmp_path, [tmp_path])
    assert again.mean == (0.1, 0.2, 0.3)
    activations = [m for m in again.model.modules() if isinstance(m, open_clip.transformer.QuickGELU)]
    assert len(activations) == 2
    assert torch.equal(encode_text(again, ["a dog"]), encode_text(loaded, ["a dog"]))


def test_weights_that_cannot_be_downloaded(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> str:
        raise OSError("no route to the hub")

    monkeypatch.setattr(open_clip.factory, "download_pretrained", unreachable)
    with pytest.raises(Unavailable, match=r"no route to the hub.*check that this machine") as caught:
        load_clip("Tiny/openai", tmp_path)
    assert isinstance(caught.value, CaptuneError)
    assert caught.value.code == "model_unavailable"


def test_the_real_openai_names_lead_to_quick_gelu_architectures() -> None:
    for arch in ("ViT-B-32", "ViT-B-16", "ViT-L-14", "RN50"):
        assert open_clip.get_pretrained_cfg(arch, "openai")["quick_gelu"]
        assert open_clip.get_model_config(f"{arch}-quickgelu")["quick_gelu"]
