"""CLIP models by name. `starter`, any open_clip `arch/pretrained`, or a local directory in open_clip's layout become
the same `LoadedClip`, which carries all that is needed to write the model down again for anybody with open_clip."""

import difflib
import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property, lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

import open_clip
import torch
from open_clip.tokenizer import HFTokenizer
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from torchvision.transforms import Compose
from torchvision.transforms.functional import pil_to_tensor

from shared.clip import local_dir
from shared.clip.starter import ensure_starter
from shared.clip.text_tower import cpu_tokens, encode_text_batch, spans, trim_padding, used_columns
from shared.errors import InvalidInput, Unavailable, cause

__all__ = [
    "LoadedClip",
    "encode_image",
    "encode_text",
    "encode_text_batch",
    "encode_tokens",
    "ensure_starter",
    "files_of",
    "load_clip",
    "normalise",
    "preprocess_uint8",
    "save_clip",
    "trim_padding",
]

log = logging.getLogger(__name__)

_GPU_TOKENS = 65536  # encoded at a time, padding counted

# What open_clip and transformers raise on a folder that is not what it claims to be.
_BROKEN = (ValueError, RuntimeError, KeyError, TypeError, AttributeError, AssertionError, OSError, SafetensorError)


@dataclass
class LoadedClip:
    """An open_clip model in eval mode, fp32, on the CPU, with what belongs to it."""

    model: Any  # open_clip CLIP or CustomTextCLIP
    name: str  # "starter", "arch/pretrained" (the arch really built) or the resolved directory
    config: dict[str, Any]  # open_clip_config.json: {"model_cfg", "preprocess_cfg"}; states quick_gelu
    tokenizer: Callable[..., Tensor]
    image_size: int  # S, pixels
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    resize_mode: str
    tokenizer_files: Path | None  # directory holding them, None for open_clip's own tokenizer or a hub's
    resize_crop: Callable[[Image.Image], Image.Image]  # the model's eval transform up to the tensor

    @cached_property
    def revision(self) -> str:
        """Which weights these are: of the SHA-256 over the state_dict's names, types, shapes and bytes, in its order,
        the first 32 hex digits. Computed once: the weights of a loaded model are not changed in place, training copies
        them."""
        digest = sha256()
        for name, value in self.model.state_dict().items():
            digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()[:32]

    @property
    def preprocessing_key(self) -> str:
        """Names what `preprocess_uint8` makes of an image: equal for two models that see the same pixels."""
        return f"{self.image_size}-{self.interpolation}-{self.resize_mode}"


class ImageRows(Protocol):
    """(N, 3, S, S) uint8, read some rows at a time: a Tensor, or shared.clip.pixels.Pixels."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice, /) -> Tensor: ...


def load_clip(name: str, cache_dir: Path, model_roots: Sequence[Path] = ()) -> LoadedClip:
    """Loads a model by name. Raises InvalidInput for a name that is wrong, Unavailable where weights can't be had.

    name: "starter" (built into `cache_dir` once) · "ViT-B-32/laion2b_s34b_b79k" (weights through open_clip, kept in
    `cache_dir`) · a local directory below one of `model_roots`, absolute or relative to a root."""
    if name == "starter":
        return _load_directory(ensure_starter(cache_dir), "starter")
    arch, _, tag = name.partition("/")
    if arch in open_clip.list_models() and tag:
        return _load_published(arch, tag, cache_dir)
    if local_dir.looks_local(name, model_roots):
        directory = local_dir.resolve(name, model_roots)
        return _load_directory(directory, str(directory))
    raise _unknown(name)


def files_of(name: str, model_roots: Sequence[Path] = ()) -> tuple[tuple[str, int, int], ...]:
    """Of a local directory its files, each with its time and size; of other models nothing, for theirs do not change.
    Whoever keeps a model by its name keeps it by these too. Raises what `load_clip` does for a directory."""
    arch, _, tag = name.partition("/")
    if name == "starter" or (arch in open_clip.list_models() and tag) or not local_dir.looks_local(name, model_roots):
        return ()
    states = [(path.name, path.stat()) for path in local_dir.resolve(name, model_roots).iterdir()]
    return tuple(sorted((file, state.st_mtime_ns, state.st_size) for file, state in states))


def save_clip(loaded: LoadedClip, model_state: Mapping[str, Tensor], directory: Path) -> None:
    """Writes `model_state` (a state_dict of `loaded.model`) as a folder that `open_clip.create_model_and_transforms`
    and `open_clip.get_tokenizer` load as "local-dir:DIRECTORY". Not atomic: the caller renames a temporary directory.

    One limit is open_clip's: for a model with a Hugging Face text tower it asks transformers for `hf_model_name`, which
    for the starter is the installed MiniLM package. In an environment where that path is missing, put the hub id there
    that the config notes under `hub_ids`. `load_clip` needs neither."""
    hf_tower = getattr(getattr(loaded.model, "text", None), "config", None)
    if not isinstance(loaded.tokenizer, HFTokenizer) or loaded.tokenizer_files is not None:
        local_dir.write(directory, loaded.config, model_state, loaded.tokenizer_files)
        return
    with tempfile.TemporaryDirectory() as files:  # a hub's tokenizer: written out so that the folder stands alone
        loaded.tokenizer.save_pretrained(files)
        if hf_tower is not None:
            hf_tower.save_pretrained(files)
        local_dir.write(directory, loaded.config, model_state, Path(files))


def preprocess_uint8(image: Image.Image, clip: LoadedClip) -> Tensor:
    """-> (3, S, S) uint8: the model's own evaluation resize and crop, without normalisation (that is `normalise`)."""
    pixels: Tensor = pil_to_tensor(clip.resize_crop(image.convert("RGB")))
    return pixels


def normalise(images_uint8: Tensor, clip: LoadedClip) -> Tensor:
    """(N, 3, S, S) uint8 -> float32 as the image tower takes it, on the same device."""
    mean, std = _constants(clip.mean, clip.std, images_uint8.device)
    images = images_uint8.contiguous(memory_format=torch.channels_last)
    return (images.float() / 255 - mean) / std


@lru_cache(maxsize=64)
def _constants(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Each (1, 3, 1, 1), made once: to send them to a GPU in each step would make the step wait for the one before."""
    return torch.tensor(mean, device=device).view(1, -1, 1, 1), torch.tensor(std, device=device).view(1, -1, 1, 1)


@torch.no_grad()
def encode_tokens(model: Any, tokens: Tensor) -> Tensor:
    """(T, L) int64 -> (T, D) float32 on the CPU, rows of length 1, in the order given; computed in batches of like
    length, which pad little. In float32, unless the caller's autocast says otherwise."""
    device = next(model.parameters()).device
    budget = cpu_tokens() if device.type == "cpu" else _GPU_TOKENS
    lengths, order = used_columns(model, tokens).sort(stable=True)
    parts = [
        encode_text_batch(model, tokens[order[start:stop], : int(lengths[stop - 1])]).float()
        for start, stop in spans(lengths.tolist(), budget)
    ]
    return torch.cat(parts).cpu()[order.argsort()]  # one wait for the device, at the end


def encode_text(clip: LoadedClip, texts: Sequence[str]) -> Tensor:
    """-> (N, D) float32 on the CPU, rows of length 1, in the order given."""
    return encode_tokens(clip.model, clip.tokenizer(list(texts)))


@torch.no_grad()
def encode_image(clip: LoadedClip, images_uint8: ImageRows, batch: int | None = None) -> Tensor:
    """(N, 3, S, S) uint8 from `preprocess_uint8` -> (N, D) float32 on the CPU, rows of length 1; in batches of 64 on
    the CPU and 256 elsewhere unless said otherwise."""
    device = next(clip.model.parameters()).device
    batch = batch or (64 if device.type == "cpu" else 256)
    rows = [
        clip.model.encode_image(normalise(images_uint8[start : start + batch].to(device), clip), normalize=True).float()
        for start in range(0, len(images_uint8), batch)
    ]
    return torch.cat(rows).cpu() if rows else torch.empty(0, _embed_dim(clip))


def _embed_dim(clip: LoadedClip) -> int:
    return int(clip.config["model_cfg"]["embed_dim"])


def _load_published(arch: str, tag: str, cache_dir: Path) -> LoadedClip:
    # open_clip would also take a file path for the tag, pickled weights included: only its own list counts here.
    known = open_clip.list_pretrained_tags_by_model(arch)
    if tag not in known:
        close = difflib.get_close_matches(tag, known, n=3, cutoff=0.3) or known[:3]
        hint = f"Did you mean {' or '.join(f'{arch}/{t}' for t in close)}?" if close else "It has no published weights."
        raise InvalidInput(
            f"open_clip knows no weights '{tag}' for {arch}. {hint}", code="unknown_model", param="model"
        )
    published = open_clip.get_pretrained_cfg(arch, tag)
    quick_gelu = bool(published.get("quick_gelu", False))
    cfg = open_clip.get_model_config(arch)
    if quick_gelu and not cfg.get("quick_gelu", False):
        # Run with GELU these weights load without an error and are silently worse.
        if f"{arch}-quickgelu" in open_clip.list_models():
            log.info("%s/%s was trained with QuickGELU: using %s-quickgelu", arch, tag, arch)
            arch, cfg = f"{arch}-quickgelu", open_clip.get_model_config(f"{arch}-quickgelu")
        else:
            log.info("%s/%s was trained with QuickGELU: turning it on", arch, tag)
    try:
        model = open_clip.create_model(
            arch, pretrained=tag, cache_dir=str(cache_dir), force_quick_gelu=quick_gelu, require_pretrained=True
        )
        tokenizer = open_clip.get_tokenizer(arch, cache_dir=str(cache_dir))
    except (RuntimeError, OSError) as error:
        log.warning("the weights of %s/%s could not be loaded into %s", arch, tag, cache_dir, exc_info=True)
        raise Unavailable(
            f"The weights of {arch}/{tag} could not be loaded ({cause(error)}). They are downloaded once into the"
            " server's cache; check that this machine reaches the model hub, or name a local directory, or use"
            " 'starter'.",
            code="model_unavailable",
            param="model",
        ) from error
    return _loaded(model, f"{arch}/{tag}", {"model_cfg": cfg}, tokenizer, None)


def _load_directory(directory: Path, name: str) -> LoadedClip:
    config, text_cfg = local_dir.read(directory)
    try:
        model = open_clip.create_model(f"local-dir:{directory}", text_cfg=text_cfg, require_pretrained=True)
        tokenizer = open_clip.get_tokenizer(f"local-dir:{directory}")
    except _BROKEN as error:
        log.info("the model in %s can't be loaded", directory, exc_info=True)
        raise InvalidInput(
            f"The model in '{directory.name}' can't be loaded ({cause(error)}). The folder must hold {local_dir.CONFIG}"
            " and the weights that belong to it, as open_clip saves them.",
            code="bad_model",
            param="model",
        ) from error
    return _loaded(model, name, config, tokenizer, directory if isinstance(tokenizer, HFTokenizer) else None)


def _loaded(model: Any, name: str, config: dict[str, Any], tokenizer: Any, files: Path | None) -> LoadedClip:
    preprocess = PreprocessCfg(**model.visual.preprocess_cfg)
    size = preprocess.size if isinstance(preprocess.size, int) else preprocess.size[0]
    if not isinstance(preprocess.size, int) and preprocess.size[0] != preprocess.size[-1]:
        raise InvalidInput(f"The model takes images of {preprocess.size} pixels; only square ones are supported.")
    kept = ("mean", "std", "interpolation", "resize_mode")
    recorded = deepcopy(config)
    recorded["model_cfg"]["quick_gelu"] = bool(recorded["model_cfg"].get("quick_gelu", False))
    recorded["preprocess_cfg"] = {key: getattr(preprocess, key) for key in kept}
    steps = image_transform_v2(preprocess, is_train=False).transforms
    if hasattr(model.visual, "trunk"):  # timm: mostly convolutions, 1.5 times faster this way on a CPU
        model.visual.to(memory_format=torch.channels_last)
    return LoadedClip(
        model=model.eval(),
        name=name,
        config=recorded,
        tokenizer=tokenizer,
        image_size=int(size),
        mean=tuple(preprocess.mean),
        std=tuple(preprocess.std),
        interpolation=preprocess.interpolation,
        resize_mode=preprocess.resize_mode,
        tokenizer_files=files,
        resize_crop=Compose(steps[:-2]),  # open_clip always ends with ToTensor and Normalize
    )


def _unknown(name: str) -> InvalidInput:
    arch = name.partition("/")[0]
    if arch in open_clip.list_models():
        tags = open_clip.list_pretrained_tags_by_model(arch)
        return InvalidInput(
            f"'{name}' names an architecture without weights."
            f" {'Name both: ' + ' or '.join(f'{arch}/{tag}' for tag in tags[:2]) if tags else 'None are published'}.",
            code="unknown_model",
            param="model",
        )
    close = difflib.get_close_matches(arch, open_clip.list_models(), n=3)
    hint = f" Did you mean {' or '.join(f'{a}/…' for a in close)}?" if close else ""
    return InvalidInput(
        f"No model is called '{name}'.{hint} Use 'starter', an open_clip 'architecture/pretrained' such as"
        " ViT-B-32/laion2b_s34b_b79k, or a directory below the model roots.",
        code="unknown_model",
        param="model",
    )
