"""Attention and compilation of the Hugging Face engine: honoured where they can be, refused clearly where not."""

import logging
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from services.captioner.engines.base import CaptionRequest
from services.captioner.engines.hf import HFEngine
from shared.errors import InvalidInput
from tests.hf_engine import make


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> HFEngine:
    return make(checkpoint)


def texts(engine: HFEngine) -> list[str]:
    picture = Image.radial_gradient("L").convert("RGB").resize((60, 90))
    requests = [CaptionRequest((picture,), "describe " * n, 4, 0.0) for n in (1, 5)]
    return [engine.finish(raw).text for raw in engine.generate([engine.prepare(request) for request in requests])]


def test_attention_is_what_was_asked_for(checkpoint: Path, engine: HFEngine, caplog: pytest.LogCaptureFixture) -> None:
    assert engine._model.config._attn_implementation == "sdpa"
    with caplog.at_level(logging.INFO):
        eager = make(checkpoint, attention="eager", precision="auto")
    assert eager._model.config._attn_implementation == "eager"
    assert "attention by eager" in caplog.text
    assert "GB free)" in caplog.text  # why this precision
    assert texts(eager) == texts(engine)
    with pytest.raises(InvalidInput, match=r"flash-attn.*CUDA device.*bf16.*'sdpa'") as caught:
        make(checkpoint, attention="flash_attention_2")
    assert caught.value.code == "attention_unavailable"


def test_compiled_says_the_same(checkpoint: Path, engine: HFEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    # The compiler's front end without its slow back end.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    compiled = make(checkpoint, compile=True)
    assert texts(compiled) == texts(engine)
    assert " compiled " in compiled.revision


def test_a_compiler_that_fails_is_noticed_at_loading(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken_backend(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=broken_backend))
    with pytest.raises(InvalidInput, match="no C\\+\\+ compiler") as caught:
        make(checkpoint, compile=True)
    assert caught.value.code == "compile_unavailable"
