"""A CLIP small enough for a unit test: random weights, open_clip's own tokenizer, the local-dir layout."""

import json
from pathlib import Path
from typing import Any

import torch
from open_clip.factory import create_model
from safetensors.torch import save_file

IMAGE_SIZE = 32  # pixels


VIT = {"image_size": IMAGE_SIZE, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
RESNET = {"image_size": IMAGE_SIZE, "layers": [1, 1, 1, 1], "width": 4, "head_width": 32}


def tiny_config(*, quick_gelu: bool = False, resnet: bool = False) -> dict[str, Any]:
    """open_clip_config.json of a 2-layer ViT (or a small ResNet) and a 2-layer text transformer, 16-d embeddings."""
    return {
        "model_cfg": {
            "embed_dim": 16,
            "quick_gelu": quick_gelu,
            "vision_cfg": RESNET if resnet else VIT,
            "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 2},
        },
        "preprocess_cfg": {
            "size": IMAGE_SIZE,
            "mode": "RGB",
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
            "interpolation": "bicubic",
            "resize_mode": "shortest",
        },
    }


def write_tiny_clip(directory: Path, *, seed: int = 0, quick_gelu: bool = False, resnet: bool = False) -> Path:
    """Write the folder (about 1 MB) and return it."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "open_clip_config.json").write_text(json.dumps(tiny_config(quick_gelu=quick_gelu, resnet=resnet)))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = create_model(f"local-dir:{directory}")
    # Half precision: the tokenizer's 49,408 embeddings are most of the file.
    state = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    save_file(state, directory / "open_clip_model.safetensors")
    return directory
