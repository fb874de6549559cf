"""Qwen2-VL and Qwen2.5-VL checkpoints of a given shape."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONTROL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PROMPT = (
    "To differentiate this labrador photo from other pets photos, describe its primary visual shape texture "
    "characteristics based on the photo in 22 words. user assistant"
)


@dataclass(frozen=True)
class Shape:
    """Sizes of one model; `family` is "qwen2_vl" or "qwen2_5_vl"."""

    family: str
    text: dict[str, Any]
    vision: dict[str, Any]


def _qwen25(hidden: int, layers: int, heads: int, kv_heads: int, inner: int, vocab: int, tied: bool) -> Shape:
    """As the configs on the hub have them (Qwen/Qwen2.5-VL-3B-Instruct and -7B-Instruct)."""
    text = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": inner,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    }
    vision = {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": hidden,
        "patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
    }
    return Shape("qwen2_5_vl", text, vision)


SHAPES = {
    # A 135 M text model (30 layers of 576, as SmolLM's smallest) with a vision tower of 8 M.
    "135m": Shape(
        "qwen2_vl",
        {
            "hidden_size": 576,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "intermediate_size": 1536,
            "vocab_size": 49_152,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 12, 12]},
        },
        {"depth": 4, "embed_dim": 384, "hidden_size": 576, "num_heads": 6, "mlp_ratio": 4, "patch_size": 14},
    ),
    "3b": _qwen25(2048, 36, 16, 2, 11_008, 151_936, tied=True),
    "7b": _qwen25(3584, 28, 28, 4, 18_944, 152_064, tied=False),
}


def write(shape: Shape, folder: Path, *, dtype: str = "bfloat16", device: str = "cpu", seed: int = 0) -> int:
    """Writes a checkpoint that the Auto classes load; returns its number of parameters."""
    import torch
    import transformers

    tokenizer = _tokenizer(int(shape.text["vocab_size"]))
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in CONTROL}
    end = ids["<|im_end|>"]
    prefix = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL"}[shape.family]
    config = getattr(transformers, f"{prefix}Config")(
        text_config=shape.text
        | {"max_position_embeddings": 32_768, "bos_token_id": None, "eos_token_id": ids["<|im_end|>"]},
        vision_config=shape.vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        tie_word_embeddings=shape.text["tie_word_embeddings"],
    )
    torch.manual_seed(seed)
    with torch.device(device):
        torch.set_default_dtype(getattr(torch, dtype))
        model = getattr(transformers, f"{prefix}ForConditionalGeneration")(config)
        torch.set_default_dtype(torch.float32)
    model.generation_config = transformers.GenerationConfig(  # type: ignore[no-untyped-call]
        eos_token_id=end, pad_token_id=ids["<|endoftext|>"]
    )
    model.save_pretrained(folder)
    processor = getattr(transformers, f"{prefix}Processor")
    processor(
        image_processor=transformers.Qwen2VLImageProcessor(
            size={"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}
        ),
        video_processor=transformers.Qwen2VLVideoProcessor(),
        tokenizer=tokenizer,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def _tokenizer(size: int) -> Any:
    """A byte-level tokenizer of exactly `size` entries, so that whatever a random model says can be read."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    # Words of a caption prompt are whole entries, as they are in a real vocabulary; the rest is made up.
    learnt = Tokenizer(models.BPE())
    learnt.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    learnt.train_from_iterator([PROMPT] * 50, trainer)
    model = json.loads(learnt.to_str())["model"]
    known = sorted(model["vocab"], key=model["vocab"].__getitem__)
    words = [f"Ġw{number}" for number in range(size - len(known) - len(CONTROL))]
    vocabulary = {token: number for number, token in enumerate([*known, *words])}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[tuple(pair) for pair in model["merges"]]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    return Qwen2Tokenizer(
        tokenizer_object=raw,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=[token for token in CONTROL if token not in ("<|im_end|>", "<|endoftext|>")],
    )
