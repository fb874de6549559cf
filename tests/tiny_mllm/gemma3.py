"""Gemma 3: pictures of one size, attended to in both directions; layers with a sliding window between full ones."""

from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessor,
    Gemma3Processor,
    PreTrainedTokenizerFast,
)

from tests.tiny_mllm.parts import TEXT, VISION, Parts, chat_template, tokens

_SIDE, _PATCH, _TOKENS = 56, 14, 4


def make(architecture: str) -> Parts:
    image = ["<start_of_image>", "<end_of_image>", "<image_soft_token>"]
    raw, ids = tokens(["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>", *image])
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=raw,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        additional_special_tokens=["<start_of_turn>", "<end_of_turn>"],
        extra_special_tokens={
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "image_token": "<image_soft_token>",
        },
        padding_side="left",
    )
    config = Gemma3Config(
        text_config={
            **TEXT,
            "vocab_size": len(tokenizer),
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": 96,
            "layer_types": ["sliding_attention", "full_attention"],
            "bos_token_id": ids["<bos>"],
            "eos_token_id": [ids["<eos>"], ids["<end_of_turn>"]],
            "pad_token_id": ids["<pad>"],
        },
        vision_config={
            "model_type": "siglip_vision_model",
            **VISION,
            "image_size": _SIDE,
            "patch_size": _PATCH,
            "vision_use_head": False,
        },
        mm_tokens_per_image=_TOKENS,
        boi_token_index=ids["<start_of_image>"],
        eoi_token_index=ids["<end_of_image>"],
        image_token_index=ids["<image_soft_token>"],
        tie_word_embeddings=False,  # tied, random weights repeat the last token
    )
    processor = Gemma3Processor(
        image_processor=Gemma3ImageProcessor(size={"height": _SIDE, "width": _SIDE}),
        tokenizer=tokenizer,
        image_seq_length=_TOKENS,
        chat_template="{{ bos_token }}"
        + chat_template(
            "<start_of_turn>",
            "<end_of_turn>",
            "<start_of_image>",
            role="'model' if message['role'] == 'assistant' else message['role']",
            answer="model",
        ),
    )
    ends = [ids["<end_of_turn>"], ids["<eos>"]]
    # It multiplies embeddings by the root of the width: as wide as elsewhere, they would drown what the layers add.
    embedding_std = 0.2 / TEXT["hidden_size"] ** 0.5
    return Parts(lambda: Gemma3ForConditionalGeneration(config), processor, ends, ids["<pad>"], embedding_std)
