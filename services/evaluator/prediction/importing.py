"""A classifier that comes as an archive: the folder that a download gives, or one with a head alone. Nothing in it is
run: names are compared with those a classifier has, weights are safetensors, and the model's config may neither name
code nor anything to be fetched."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shared.classifier.card import CARD, CHANGED, HEAD
from shared.clip.local_dir import CONFIG, TEXT_CONFIG, TOKENIZER_FILES, WEIGHTS
from shared.datasets.archive import open_archive
from shared.datasets.limits import Limits
from shared.errors import InvalidInput

_README = "README.md"  # every download gets one anew
_NAMES = {CARD, HEAD, CHANGED, CONFIG, WEIGHTS, _README, *TOKENIZER_FILES}
_CODE = frozenset({"auto_map", "custom_pipelines", "trust_remote_code"})
_KERNELS = tuple(f"{kind}_implementation{end}" for kind in ("attn", "experts") for end in ("", "_internal"))
# Text towers that open_clip builds (its hf_configs.arch_dict). Those of transformers are hundreds, and some fetch.
_TEXT_TOWERS = ("bert", "m2m_100", "mt5", "roberta", "xlm-roberta")
_MAX_FILES = 100
_MAX_JSON = 64 * 2**20  # bytes: a large tokenizer has 20 MB
_MAX_RATIO = 20.0  # unpacked over packed; weights hardly shrink


def unpack(archive: Path, directory: Path, max_bytes: int) -> None:
    """Writes the files of a zip or tar, from its root or from one folder, into `directory`, one file in memory at a
    time. Raises InvalidInput (BadArchive where the archive itself is unusable)."""
    limits = Limits(_MAX_FILES, max_member_bytes=max_bytes, max_total_bytes=max_bytes, max_ratio=_MAX_RATIO)
    opened = open_archive(archive, limits)
    names = opened.names()
    if opened.report.refusals:
        first = opened.report.refusals[0]
        raise _bad(f"its entry '{first.path}' is refused: {first.message}")
    if len({name.rpartition("/")[0] for name in names}) > 1:
        raise _bad("its files lie in several folders; a classifier's lie in one")
    for member in opened.members():
        name = member.path.rpartition("/")[2]
        if name not in _NAMES:
            raise _bad(f"it holds '{name}', which is no file of a classifier ({', '.join(sorted(_NAMES))})")
        if name.endswith(".json") and member.size > _MAX_JSON:
            raise _bad(f"{name} has {member.size} bytes, and it may have {_MAX_JSON}")
        if name != _README:
            (directory / name).write_bytes(member.read())
    _refuse_what_reaches_out(directory)


def _refuse_what_reaches_out(directory: Path) -> None:
    if not (directory / CONFIG).is_file():
        return  # a head on a base model; the model's own loader checks the rest
    model = _object(directory / CONFIG).get("model_cfg")
    towers = [model.get(name) if isinstance(model, dict) else None for name in ("vision_cfg", "text_cfg")]
    vision, text = (tower if isinstance(tower, dict) else {} for tower in towers)
    if ":" in str(vision.get("timm_model_name", "")) or vision.get("timm_model_pretrained"):
        raise _bad(f"{CONFIG} names an image tower that is to be fetched; its weights must be in the archive")
    for key, file in (("hf_model_name", TEXT_CONFIG), ("hf_tokenizer_name", "tokenizer.json")):
        if text.get(key) and not (directory / file).is_file():
            raise _bad(f"{CONFIG} names '{text[key]}' as its {key}, but {file} is not in the archive")
    for name in (TEXT_CONFIG, "tokenizer_config.json"):
        if (directory / name).is_file() and (asked := next(_reaches_out(_object(directory / name)), None)):
            raise _bad(f"{name} asks for code or a model from elsewhere ('{asked}'), which is never run or fetched")
    if (directory / TEXT_CONFIG).is_file():
        _check_text_tower(_object(directory / TEXT_CONFIG))


def _reaches_out(config: Any) -> Iterator[str]:
    """Names under which a config of transformers, or one inside it, can name code (modules, or kernels of a hub) or
    another model."""
    for each in _objects(config):
        yield from _CODE.intersection(each)
        yield from (key for key, value in each.items() if key.endswith(_KERNELS) and "/" in str(value))
        yield from (key for key in each if key.startswith("backbone"))


def _check_text_tower(config: dict[str, Any]) -> None:
    kinds = [config.get("model_type"), *(each["model_type"] for each in _objects(config) if "model_type" in each)]
    if any(kind not in _TEXT_TOWERS for kind in kinds):
        raise _bad(f"{TEXT_CONFIG} is of no model_type that a text tower may have ({', '.join(_TEXT_TOWERS)})")


def _objects(config: Any) -> Iterator[dict[str, Any]]:
    """A JSON value's objects, itself and all inside."""
    inner = [config]
    while inner:
        value = inner.pop()
        if isinstance(value, dict):
            yield value
            inner.extend(value.values())
        elif isinstance(value, list):
            inner.extend(value)


def _object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise _bad(f"{path.name} is not JSON ({error})") from error
    if not isinstance(found, dict):
        raise _bad(f"{path.name} is not a JSON object")
    return found


def _bad(reason: str) -> InvalidInput:
    return InvalidInput(
        f"The archive can't be imported as a classifier: {reason}. GET /v1/classifiers/{{id}}/download gives one that "
        "can.",
        code="bad_classifier",
        param="file",
    )
