"""Qwen2-VL, Qwen2.5-VL (windowed vision attention) and Qwen3-VL (features that enter at deeper layers too): pictures of
any size, cut into patches that lie in one long row."""

from typing import Any

from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from tests.tiny_mllm.parts import TEXT, Parts, chat_template, tokens

_CONTROL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]

_VARIANTS: dict[str, tuple[Any, ...]] = {
    "qwen2_vl": (Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLProcessor, Qwen2VLVideoProcessor),
    "qwen2_5_vl": (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor, Qwen2VLVideoProcessor),
    "qwen3_vl": (Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLProcessor, Qwen3VLVideoProcessor),
}

_TEXT: dict[str, dict[str, Any]] = {"qwen3_vl": {"head_dim": 16}}
_VISION: dict[str, dict[str, Any]] = {
    "qwen2_vl": {"embed_dim": 64, "mlp_ratio": 2},
    "qwen2_5_vl": {
        "out_hidden_size": 64,
        "intermediate_size": 128,
        "window_size": 56,
        "fullatt_block_indexes": [1],
        "tokens_per_second": 2,
    },
    "qwen3_vl": {
        "out_hidden_size": 64,
        "intermediate_size": 128,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 1],
    },
}


def make(architecture: str) -> Parts:
    raw, ids = tokens(_CONTROL)
    tokenizer = Qwen2Tokenizer(
        tokenizer_object=raw,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=[token for token in _CONTROL if token not in ("<|im_end|>", "<|endoftext|>")],
        padding_side="right",  # as many hub checkpoints say; the engine has to turn it round
    )
    make_config, make_model, make_processor, make_video_processor = _VARIANTS[architecture]
    config = make_config(
        text_config={
            **TEXT,
            "vocab_size": len(tokenizer),
            **_TEXT.get(architecture, {}),
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 3, 3]},
        },
        vision_config={"depth": 2, "hidden_size": 64, "num_heads": 4, "patch_size": 14, **_VISION[architecture]},
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
    )
    processor = make_processor(
        image_processor=Qwen2VLImageProcessor(size={"shortest_edge": 28 * 28 * 4, "longest_edge": 28 * 28 * 64}),
        video_processor=make_video_processor(),
        tokenizer=tokenizer,
        chat_template=chat_template("<|im_start|>", "<|im_end|>", "<|vision_start|><|image_pad|><|vision_end|>"),
    )
    return Parts(lambda: make_model(config), processor, [ids["<|im_end|>"], ids["<|endoftext|>"]], ids["<|endoftext|>"])
