"""Multimodal checkpoints small enough for a unit test, in the format the hub serves: config, safetensors, a trained
byte-level tokenizer, processor and chat template. Weights are random (seeded), so their text is noise; what they share
with the real models is everything around the weights."""

from importlib import import_module
from pathlib import Path

CONTEXT_LENGTH = 2048

#: name -> module that builds it
ARCHITECTURES = {
    "qwen2_vl": "qwen",
    "qwen2_5_vl": "qwen",
    "qwen3_vl": "qwen",
    "llava": "llava",
    "llava_onevision": "llava",
    "idefics3": "idefics3",
    "gemma3": "gemma3",
    "internvl": "internvl",
}


def build(folder: Path, architecture: str = "qwen2_vl", *, seed: int = 0, end_token_weight: float = 0.0) -> Path:
    """Write the checkpoint into `folder` (made if missing) and return it; about 1 MB, under a second.

    `end_token_weight` > 0 makes the end token likelier, so that sampled texts stop by themselves.
    """
    from tests.tiny_mllm.parts import save

    module = import_module(f"tests.tiny_mllm.{ARCHITECTURES[architecture]}")
    return save(module.make(architecture), folder, seed=seed, end_token_weight=end_token_weight)
