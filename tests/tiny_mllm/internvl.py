"""InternVL: the tiles of all pictures on one axis, whatever picture they belong to."""

from transformers import (
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    Qwen2Tokenizer,
)

from tests.tiny_mllm.parts import TEXT, VISION, Parts, chat_template, tokens

_SIDE, _PATCH = 56, 14
_TOKENS = (_SIDE // _PATCH) ** 2 // 4


def make(architecture: str) -> Parts:
    named = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    raw, ids = tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>", *named.values()])
    tokenizer = Qwen2Tokenizer(
        tokenizer_object=raw,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        extra_special_tokens=named,
        padding_side="right",
    )
    config = InternVLConfig(
        text_config={
            "model_type": "qwen2",
            **TEXT,
            "vocab_size": len(tokenizer),
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
        },
        vision_config={**VISION, "image_size": [_SIDE, _SIDE], "patch_size": [_PATCH, _PATCH]},
        image_token_id=ids["<IMG_CONTEXT>"],
        image_seq_length=_TOKENS,
        tie_word_embeddings=False,
    )
    square = {"height": _SIDE, "width": _SIDE}
    processor = InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(size=square, crop_to_patches=True, min_patches=1, max_patches=4),
        video_processor=InternVLVideoProcessor(size=square),
        tokenizer=tokenizer,
        image_seq_length=_TOKENS,
        chat_template=chat_template("<|im_start|>", "<|im_end|>", "<IMG_CONTEXT>\n"),
    )
    ends = [ids["<|im_end|>"], ids["<|endoftext|>"]]
    return Parts(lambda: InternVLForConditionalGeneration(config), processor, ends, ids["<|endoftext|>"])
