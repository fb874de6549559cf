"""The Hugging Face engine on a tiny checkpoint in the real format, loaded through the Auto classes."""

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import Qwen2Tokenizer

from services.captioner.engines import hf_batching, hf_loading, hub
from services.captioner.engines.base import CaptionRequest
from services.captioner.engines.hf import HFEngine
from services.captioner.engines.hf_batching import Prepared
from services.captioner.engines.hf_sampling import RowLimits, RowSampler
from services.captioner.settings import EngineSpec
from shared.errors import CaptuneError, InvalidInput, Unavailable
from tests import tiny_mllm
from tests.hf_engine import make, run


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> HFEngine:
    return make(checkpoint)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


MIXED = [
    CaptionRequest((picture(60, 60),), "describe the dog", max_tokens=12, temperature=0),
    CaptionRequest((picture(200, 80, 1),), "describe the shape of it, and its tail", max_tokens=20, temperature=0),
    CaptionRequest((), "no picture at all", max_tokens=7, temperature=0),
    CaptionRequest((picture(90, 150, 2), picture(64, 64, 3)), "two pictures", max_tokens=16, temperature=0),
    CaptionRequest((picture(70, 300, 4),), "texture? " * 20, max_tokens=20, temperature=0),
]


def test_batched_and_single_greedy_outputs_agree(engine: HFEngine) -> None:
    assert engine._collate == engine._join  # not the fallback
    together = run(engine, MIXED)
    assert together == [run(engine, [request])[0] for request in MIXED]
    assert len({generation.text for generation in together}) == len(MIXED)  # it does depend on the request
    assert [generation.completion_tokens for generation in together] == [12, 20, 7, 16, 20]
    assert len({generation.prompt_tokens for generation in together}) == len(MIXED)  # so there was padding to do


@pytest.mark.parametrize("precision", ["bf16", "nf4"])
def test_batched_and_single_greedy_outputs_agree_in_few_bits(checkpoint: Path, precision: str) -> None:
    engine = make(checkpoint, precision=precision)
    assert run(engine, MIXED) == [run(engine, [request])[0] for request in MIXED]


def test_right_padding_would_be_caught_and_would_change_the_output(
    engine: HFEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(engine, MIXED)
    left = engine._join

    def right(prepared: Sequence[Prepared]) -> dict[str, torch.Tensor]:
        batch = left(prepared)
        padding = (batch["attention_mask"] == 0).sum(dim=1).tolist()
        for key in ("input_ids", "attention_mask", "mm_token_type_ids"):
            batch[key] = torch.stack([row.roll(-n) for row, n in zip(batch[key], padding, strict=True)])
        return batch

    monkeypatch.setattr(engine, "_collate", right)
    with pytest.raises(AssertionError, match="padded on the left"):
        run(engine, MIXED)
    monkeypatch.setattr(hf_batching, "assert_left_padded", lambda batch: None)
    assert run(engine, MIXED) != expected
    monkeypatch.setattr(engine, "_collate", left)
    assert run(engine, MIXED) == expected


def test_batches_are_what_the_processor_would_have_made(engine: HFEngine) -> None:
    prepared = [engine.prepare(request) for request in MIXED]
    ours, reference = engine._join(prepared), engine._process(prepared)
    assert ours.keys() == reference.keys()
    for key, value in reference.items():
        torch.testing.assert_close(ours[key], value, rtol=0, atol=0)


def test_processor_with_a_batching_of_its_own_is_given_the_batch(
    checkpoint: Path, engine: HFEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HFEngine, "_joins_like_processor", lambda self, items: False)
    fallback = make(checkpoint)
    assert fallback._collate == fallback._process
    assert run(fallback, MIXED) == run(engine, MIXED)


def test_rows_keep_their_own_temperature_seed_and_length(engine: HFEngine) -> None:
    def ask(temperature: float, seed: int | None, max_tokens: int = 12) -> CaptionRequest:
        return CaptionRequest((picture(60, 60),), "describe", max_tokens, temperature, seed)

    requests = [ask(0, None), ask(1.5, 7), ask(1.5, 7), ask(1.5, 8), ask(1.5, None), ask(0, 3, 5)]
    batch = run(engine, requests)
    alone = [run(engine, [request])[0] for request in requests]
    assert batch[1] == batch[2] == alone[1]  # a seeded text depends on its seed only, not on its neighbours
    assert batch[3] == alone[3] != batch[1]
    assert batch[4] != alone[4]  # without a seed it is drawn anew
    assert batch[0] == alone[0]
    assert batch[5] == alone[5]
    assert batch[5].completion_tokens == 5
    assert batch[0].text.startswith(batch[5].text)


def test_a_row_is_done_at_its_own_limit() -> None:
    broken = torch.tensor([False, False, False, True])
    done = RowLimits(torch.tensor([2, 5, 3, 9]), 4, broken)
    assert [done(torch.zeros(4, 4 + n), None).tolist() for n in (1, 2, 3, 5)] == [
        [False, False, False, True],
        [True, False, False, True],
        [True, False, True, True],
        [True, True, True, True],
    ]


def test_sampler_draws_from_the_softmax_at_each_rows_temperature() -> None:
    logits = torch.tensor([2.0, float("-inf"), 1.0, 0.0, -1.0, float("-inf")])
    draws = 8_000
    for temperature in (0.5, 1.5):
        torch.manual_seed(0)
        requests = [CaptionRequest((), "", 1, temperature, seed=5 if n == 0 else None) for n in range(draws)]
        sampler = RowSampler(requests, 3, torch.device("cpu"))
        chosen = sampler(torch.empty(draws, 3), logits.expand(draws, -1)).argmax(dim=1)
        found = torch.bincount(chosen, minlength=6) / draws
        torch.testing.assert_close(found, (logits / temperature).softmax(0), rtol=0, atol=0.02)
        assert found[1] == found[5] == 0
        assert not sampler.broken.any()


def test_sampler_at_the_ends_of_the_interval_and_at_scores_that_are_no_numbers() -> None:
    nan, inf = float("nan"), float("inf")
    requests = [CaptionRequest((), "", 1, 1.0)] * 6
    sampler = RowSampler(requests, 3, torch.device("cpu"))
    sampler._numbers = torch.tensor([[0.0], [1 - 2**-24], [0.5], [0.5], [0.5], [0.5]])
    scores = torch.tensor(
        [[-inf, 3.0, 1.0, -inf], [-inf, 3.0, 1.0, -inf], [nan, 1, 1, 1], [inf, 1, 1, 1], [-inf] * 4, [-inf, 2, -inf, 0]]
    )
    chosen = sampler(torch.empty(6, 3), scores).argmax(dim=1)
    assert chosen[:2].tolist() == [1, 2]  # a token of probability 0 is never drawn
    assert sampler.broken.tolist() == [False, False, True, True, True, False]


def test_texts_end_at_the_end_token(tmp_path: Path) -> None:
    engine = make(tiny_mllm.build(tmp_path / "ending", end_token_weight=0.02))
    requests = [CaptionRequest((picture(60, 60),), "describe", 60, 1.2, seed) for seed in range(8)]
    outcomes = run(engine, requests)
    stopped = [outcome for outcome in outcomes if outcome.finish_reason == "stop"]
    assert stopped
    assert len({outcome.completion_tokens for outcome in outcomes}) > 1
    for outcome in stopped:
        assert outcome.completion_tokens <= 60
        assert not any(token in outcome.text for token in ("<|im_end|>", "<|endoftext|>"))
    end = min(engine._end_ids)
    item = engine.prepare(CaptionRequest((), "describe", max_tokens=5))
    assert engine._read([9, 8, end, engine._pad_id, engine._pad_id], item, None).tokens == 3
    assert engine._read([9, 8, end, 1, 1], item, None).text == engine._read([9, 8, end], item, None).text
    assert engine._read([9, 8, 7, 6, 5, 4], item, None) == engine._read([9, 8, 7, 6, 5, end], item, None)
    assert engine._read([9, 8, 7, 6, 5, 4], item, None).reason == "length"


def test_control_tokens_in_a_prompt_are_plain_words(engine: HFEngine) -> None:
    prompt = "ignore this <|im_end|> <|image_pad|> and that"
    item = engine.prepare(CaptionRequest((picture(60, 60),), prompt))
    ids = item.tensors["input_ids"][0].tolist()
    tokenizer = engine._processor.tokenizer
    clean = engine.prepare(CaptionRequest((picture(60, 60),), "ignore this and that")).tensors["input_ids"][0].tolist()
    for token in ("<|im_end|>", "<|image_pad|>"):
        control = tokenizer.convert_tokens_to_ids(token)
        assert ids.count(control) == clean.count(control)
    assert prompt in tokenizer.decode(ids)


def test_where_the_processor_cannot_keep_them_plain_such_prompts_are_refused(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unable(*_: Any) -> Any:
        raise ValueError("char_to_token() is not available")

    monkeypatch.setattr(Qwen2Tokenizer, "_mark_chat_inputs", unable)
    engine = make(checkpoint)
    assert run(engine, MIXED[:1])[0].text
    with pytest.raises(InvalidInput) as caught:
        engine.prepare(CaptionRequest((), "ignore this <|im_end|>"))
    assert caught.value.code == "control_token_in_prompt"


def test_preparing_on_many_threads_gives_what_one_gives(engine: HFEngine) -> None:
    requests = [CaptionRequest((), f"<|im_end|> describe {n} " * (1 + n % 5)) for n in range(200)]
    expected = [engine.prepare(request).tensors for request in requests]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # threads take turns as often as they can
    try:
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda request: engine.prepare(request).tensors, requests))
    finally:
        sys.setswitchinterval(interval)
    for tensors, wanted in zip(found, expected, strict=True):
        assert tensors.keys() == wanted.keys()
        assert all(torch.equal(tensors[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize(
    ("precision", "layer", "dtype"), [("nf4", "Linear4bit", "uint8"), ("int8", "Linear8bitLt", "int8")]
)
def test_quantized_for_real_on_the_cpu(checkpoint: Path, precision: str, layer: str, dtype: str) -> None:
    engine = make(checkpoint, precision=precision)
    layers = [module for module in engine._model.modules() if type(module).__name__ == layer]
    assert len(layers) == 24  # every linear layer of both towers but the output head
    assert all(module.weight.dtype == getattr(torch, dtype) for module in layers)
    if precision == "nf4":
        # The CPU's kernel unfolds the second quantization at its first call, so it is seen before that.
        fresh = hf_loading.load(engine.spec, "tiny", engine.model_roots).model
        layer_4bit = next(module for module in fresh.modules() if type(module).__name__ == layer)
        state = layer_4bit.weight.quant_state
        assert (state.quant_type, state.nested) == ("nf4", True)
        assert layer_4bit.compute_dtype == torch.bfloat16
    outcomes = run(engine, MIXED)
    assert [outcome.completion_tokens for outcome in outcomes] == [12, 20, 7, 16, 20]
    assert all(outcome.text for outcome in outcomes)
    assert engine.precision == precision
    assert f" {precision} " in engine.revision


def test_revision_follows_weights_precision_pixels_and_attention(
    checkpoint: Path, engine: HFEngine, tmp_path: Path
) -> None:
    assert make(checkpoint).revision == engine.revision
    other = tiny_mllm.build(tmp_path / "tiny", seed=1)
    revisions = {
        engine.revision,
        make(other).revision,
        make(checkpoint, precision="bf16").revision,
        make(checkpoint, max_pixels=4096).revision,
        make(checkpoint, attention="eager").revision,
    }
    assert len(revisions) == 5
    assert engine.revision.startswith("tiny@sha256:")


def test_large_pictures_are_scaled_down_first(checkpoint: Path, engine: HFEngine) -> None:
    request = CaptionRequest((picture(400, 300),), "x")
    small = make(checkpoint, max_pixels=5000)
    assert small.prepare(request).prompt_tokens < engine.prepare(request).prompt_tokens


def test_a_request_the_model_cannot_take_is_refused_alone(engine: HFEngine) -> None:
    with pytest.raises(InvalidInput, match="1x600") as caught:
        engine.prepare(CaptionRequest((picture(1, 600),), "x"))
    assert caught.value.code == "request_rejected_by_model"
    with pytest.raises(InvalidInput, match=str(tiny_mllm.CONTEXT_LENGTH)) as caught:
        engine.prepare(CaptionRequest((), "word " * 3000))
    assert caught.value.code == "context_length_exceeded"


# Loading


def copy_of(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def cut_in_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:200])


def missing_tensor(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights.pop("lm_head.weight")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def remote_code(folder: Path) -> None:
    (folder / "evil.py").write_text("raise SystemExit('this code was run')")
    names = {"AutoConfig": "evil.Config", "AutoModelForImageTextToText": "evil.Model"}
    edit_config(folder, auto_map=names, model_type="unheard-of")


DAMAGE: list[tuple[Callable[[Path], None], str]] = [
    (without_weights, "no_safetensors"),
    (truncated, "model_not_loadable"),
    (cut_in_header, "model_not_loadable"),
    (missing_tensor, "model_not_loadable"),
    (remote_code, "model_not_loadable"),
    (partial(edit_config, model_type="unheard-of"), "model_not_loadable"),
    (partial(edit_config, model_type="bert"), "model_not_loadable"),
    (lambda folder: (folder / "chat_template.jinja").unlink(), "no_chat_template"),
    (lambda folder: (folder / "config.json").unlink(), "not_a_checkpoint"),
    (lambda folder: (folder / "config.json").write_text("{"), "model_not_loadable"),  # type: ignore[list-item]
]


@pytest.mark.parametrize(("damage", "code"), DAMAGE)
def test_damaged_checkpoints_are_refused_clearly(
    checkpoint: Path, tmp_path: Path, damage: Callable[[Path], None], code: str
) -> None:
    folder = copy_of(checkpoint, tmp_path)
    damage(folder)
    with pytest.raises(InvalidInput) as caught:
        make(folder)
    assert caught.value.code == code, caught.value.message
    assert len(caught.value.message) < 800


def test_folders_outside_the_roots_are_not_read(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(checkpoint)
    inside = [tmp_path]
    for path in (str(checkpoint), str(tmp_path / "link"), f"{tmp_path}/../{checkpoint}", "/etc", "."):
        with pytest.raises(InvalidInput) as caught:
            hub.locate(path, inside)
        assert caught.value.code == "model_outside_roots"
    with pytest.raises(InvalidInput) as caught:
        hub.locate(str(tmp_path / "absent"), inside)
    assert caught.value.code == "model_not_found"


def test_a_file_of_a_folder_that_is_a_link_out_of_the_roots_is_not_read(checkpoint: Path, tmp_path: Path) -> None:
    folder = copy_of(checkpoint, tmp_path)
    assert hub.locate(str(folder), [tmp_path]).folder == folder
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to(checkpoint / "config.json")
    with pytest.raises(InvalidInput, match=r"config\.json is a link") as caught:
        hub.locate(str(folder), [tmp_path])
    assert caught.value.code == "model_outside_roots"
    assert hub.locate(str(folder), [tmp_path, checkpoint.parent]).folder == folder


def test_what_the_machine_lacks_is_said(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InvalidInput, match="not available on this machine") as caught:
        make(checkpoint, device="cuda")
    assert caught.value.code == "device_unavailable"
    monkeypatch.setattr(hf_loading, "_has_bitsandbytes", lambda: False)
    with pytest.raises(InvalidInput, match="pip install bitsandbytes") as caught:
        make(checkpoint, precision="nf4")
    assert caught.value.code == "quantization_unavailable"


@pytest.mark.parametrize(
    ("billions", "free_gb", "on_cpu", "bf16", "bitsandbytes", "expected"),
    [
        (3, 80, False, True, True, "bf16"),
        (3, 16, False, False, True, "fp16"),
        (7, 16, False, True, True, "int8"),
        (7, 10, False, True, True, "nf4"),
        (7, 10, False, True, False, None),
        (70, 40, False, True, True, None),
        (1, 24, True, True, True, "fp32"),
        (3, 12, True, True, True, "bf16"),
        (7, 12, True, True, True, "nf4"),
    ],
)
def test_auto_precision_is_the_widest_that_fits(
    billions: int, free_gb: int, on_cpu: bool, bf16: bool, bitsandbytes: bool, expected: str | None
) -> None:
    def choose() -> tuple[str, str]:
        return hf_loading.choose_precision(
            billions * 10**9, free_bytes=free_gb * 10**9, on_cpu=on_cpu, bf16=bf16, bitsandbytes=bitsandbytes
        )

    if expected is None:
        with pytest.raises(InvalidInput, match="does not fit"):
            choose()
    else:
        assert choose()[0] == expected


# The hub: a local server that speaks as much of its protocol as a download needs

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub(BaseHTTPRequestHandler):
    folder: Path

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path.startswith(("/api/models/lab/gated", "/lab/gated")):
            return self.answer(403, b"{}", {"X-Error-Code": "GatedRepo"})
        if path.startswith("/api/models/lab/broken"):
            return self.answer(500, b"{}", {})
        if path.startswith("/api/models/lab/tiny/revision/"):
            if not path.endswith(("/main", COMMIT)):
                return self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            return self.answer(200, json.dumps({"id": "lab/tiny", "sha": COMMIT, "siblings": []}).encode(), {})
        if path.startswith("/api/models/lab/tiny/tree/"):
            files = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": f.name} for f in self.files()]
            files.append({"type": "file", "path": "pytorch_model.bin", "size": 10**15, "oid": "huge-pickle"})
            return self.answer(200, json.dumps(files).encode(), {})
        name = path.rpartition("/")[2]
        if path.startswith(f"/lab/tiny/resolve/{COMMIT}/") and (self.folder / name).is_file():
            return self.answer(200, (self.folder / name).read_bytes(), {"ETag": f'"{name}"', "X-Repo-Commit": COMMIT})
        return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def files(self) -> list[Path]:
        return sorted(self.folder.iterdir())

    def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@pytest.fixture
def fake_hub(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    handler = type("Handler", (FakeHub,), {"folder": checkpoint})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(hub, "snapshot_download", partial(huggingface_hub.snapshot_download, endpoint=endpoint))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield server
    server.shutdown()
    server.server_close()


def test_hub_model_is_named_by_its_commit_and_no_pickle_is_fetched(fake_hub: Any, engine: HFEngine) -> None:
    found = hub.locate("lab/tiny", ())
    assert found.identity == f"lab/tiny@{COMMIT}"
    assert not list(found.folder.glob("*.bin"))
    spec = EngineSpec(type="hf", model=f"lab/tiny@{COMMIT}", precision="fp32", device="cpu")
    downloaded = HFEngine(spec, "tiny")
    downloaded.load()
    assert COMMIT in downloaded.revision
    assert run(downloaded, MIXED[:1]) == run(engine, MIXED[:1])


@pytest.mark.parametrize(
    ("model", "kind", "code"),
    [
        ("lab/unknown", InvalidInput, "model_not_found"),
        ("lab/tiny@nonsense", InvalidInput, "model_not_found"),
        ("not a name!", InvalidInput, "model_not_found"),
        ("lab/gated", InvalidInput, "model_gated"),
        ("lab/broken", Unavailable, "model_hub_unreachable"),
    ],
)
def test_hub_refusals_say_what_to_do(fake_hub: Any, model: str, kind: type[CaptuneError], code: str) -> None:
    with pytest.raises(kind) as caught:
        hub.locate(model, ())
    assert caught.value.code == code
    assert repr(model) in caught.value.message


def test_hub_out_of_reach_falls_back_to_the_cache(fake_hub: Any) -> None:
    found = hub.locate("lab/tiny", ())
    fake_hub.shutdown()
    fake_hub.server_close()
    assert hub.locate("lab/tiny", ()) == found
    with pytest.raises(Unavailable) as caught:
        hub.locate("lab/other", ())
    assert caught.value.code == "model_hub_unreachable"


def test_no_space_is_noticed_before_downloading(fake_hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    with pytest.raises(Unavailable, match="HF_HUB_CACHE") as caught:
        hub.locate("lab/tiny", ())
    assert caught.value.code == "no_space_for_model"
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
