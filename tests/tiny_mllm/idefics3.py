"""Idefics3, SmolVLM's architecture: the picture in tiles and as a whole, all pictures of a prompt on one row."""

from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
    PreTrainedTokenizerFast,
)

from tests.tiny_mllm.parts import TEXT, VISION, Parts, chat_template, tokens

_TILE, _PATCH, _SHUFFLE = 56, 14, 2


def make(architecture: str) -> Parts:
    image = ["<fake_token_around_image>", "<image>", "<global-img>"]
    image += [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    raw, ids = tokens(["<|endoftext|>", "<|im_start|>", "<end_of_utterance>", *image])
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=raw,
        bos_token="<|im_start|>",
        eos_token="<end_of_utterance>",
        pad_token="<|endoftext|>",
        additional_special_tokens=image,
        padding_side="right",
    )
    config = Idefics3Config(
        text_config={
            "model_type": "llama",
            **TEXT,
            "vocab_size": len(tokenizer),
            "eos_token_id": ids["<end_of_utterance>"],
            "pad_token_id": ids["<|endoftext|>"],
        },
        vision_config={**VISION, "image_size": _TILE, "patch_size": _PATCH},
        image_token_id=ids["<image>"],
        scale_factor=_SHUFFLE,
    )
    processor = Idefics3Processor(
        image_processor=Idefics3ImageProcessor(
            size={"longest_edge": 2 * _TILE}, max_image_size={"longest_edge": _TILE}
        ),
        tokenizer=tokenizer,
        image_seq_len=(_TILE // _PATCH) ** 2 // _SHUFFLE**2,
        chat_template=chat_template("<|im_start|>", "<end_of_utterance>", "<image>"),
    )
    ends = [ids["<end_of_utterance>"], ids["<|endoftext|>"]]
    return Parts(lambda: Idefics3ForConditionalGeneration(config), processor, ends, ids["<|endoftext|>"])
