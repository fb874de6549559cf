"""LLaVA 1.5 (one square picture) and LLaVA-OneVision (the picture and its tiles, but only the picture where a prompt
has several)."""

from typing import Any

from transformers import (
    CLIPImageProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
)

from tests.tiny_mllm.parts import TEXT, VISION, Parts, chat_template, tokens

_SIDE, _PATCH = 56, 14
_TOKENS = (_SIDE // _PATCH) ** 2
_TILINGS = [[rows * _SIDE, columns * _SIDE] for rows in (1, 2) for columns in (1, 2)]


def make(architecture: str) -> Parts:
    return {"llava": _llava, "llava_onevision": _onevision}[architecture]()


def _llava() -> Parts:
    control = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
    raw, ids = tokens(control)
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=raw,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["<image>"],
        padding_side="right",
    )
    config = LlavaConfig(
        text_config={"model_type": "llama", **TEXT, **_ids(tokenizer)},
        vision_config={
            "model_type": "clip_vision_model",
            **VISION,
            "image_size": _SIDE,
            "patch_size": _PATCH,
            "projection_dim": 64,
        },
        image_token_index=ids["<image>"],
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    processor = LlavaProcessor(  # type: ignore[no-untyped-call]
        image_processor=CLIPImageProcessor(size={"shortest_edge": _SIDE}, crop_size={"height": _SIDE, "width": _SIDE}),
        tokenizer=tokenizer,
        patch_size=_PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template("", "", "<image>\n", role="message['role'].upper() + ':'", answer="ASSISTANT:"),
    )
    return Parts(lambda: LlavaForConditionalGeneration(config), processor, [ids["</s>"]], ids["<pad>"])


def _onevision() -> Parts:
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>"]
    raw, ids = tokens(control)
    tokenizer = Qwen2Tokenizer(
        tokenizer_object=raw,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<image>", "<video>"],
        padding_side="right",
    )
    config = LlavaOnevisionConfig(
        text_config={"model_type": "qwen2", **TEXT, **_ids(tokenizer)},
        vision_config={
            "model_type": "siglip_vision_model",
            **VISION,
            "image_size": _SIDE,
            "patch_size": _PATCH,
            "vision_use_head": False,
        },
        image_token_index=ids["<image>"],
        video_token_index=ids["<video>"],
        image_grid_pinpoints=_TILINGS,
    )
    square = {"height": _SIDE, "width": _SIDE}
    processor = LlavaOnevisionProcessor(  # type: ignore[no-untyped-call]
        image_processor=LlavaOnevisionImageProcessor(size=square, image_grid_pinpoints=_TILINGS),
        video_processor=LlavaOnevisionVideoProcessor(size=square),
        tokenizer=tokenizer,
        num_image_tokens=_TOKENS,
        vision_feature_select_strategy="full",
        chat_template=chat_template("<|im_start|>", "<|im_end|>", "<image>\n"),
    )
    ends = [ids["<|im_end|>"], ids["<|endoftext|>"]]
    return Parts(lambda: LlavaOnevisionForConditionalGeneration(config), processor, ends, ids["<|endoftext|>"])


def _ids(tokenizer: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
