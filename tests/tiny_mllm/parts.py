"""What all tiny checkpoints have in common: a tokenizer, a language model's sizes, weights, the files."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import GenerationConfig

from tests.tiny_mllm import CONTEXT_LENGTH

_CORPUS = [
    "a photo of a golden retriever. the dog has a thick coat and floppy ears.",
    "describe the visual appearance of the object in the picture in twenty words or fewer.",
    "the shape is round with a long tail; the texture is smooth, striped and glossy.",
    "user assistant system image class domain colour pattern context outline surface",
]

#: Sizes of the language model, by the names that nearly all configs use.
TEXT: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT_LENGTH,
    "bos_token_id": None,
}

#: Sizes of a vision tower that takes square pictures of one size.
VISION: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


@dataclass
class Parts:
    """A checkpoint before its weights: `model` makes it, with weights of its own choice."""

    model: Callable[[], Any]
    processor: Any
    ends: Sequence[int]  # token ids
    pad: int
    embedding_std: float = 0.2


def tokens(control: Sequence[str]) -> tuple[Tokenizer, dict[str, int]]:
    """A byte-level BPE of 500 tokens in which `control` are single ones, and their ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=list(control), initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    vocabulary = tokenizer.get_vocab()
    return tokenizer, {token: vocabulary[token] for token in control}


def chat_template(start: str, end: str, image: str, role: str = "message['role']", answer: str = "assistant") -> str:
    """`start`, the role, a line break, the parts in order, `end`; for each message."""
    return (
        f"{{% for message in messages %}}{start}{{{{ {role} }}}}\n"
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
        "{% for part in message['content'] %}"
        f"{{% if part['type'] == 'image' %}}{image}"
        "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
        f"{{% endfor %}}{{% endif %}}{end}\n{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{start}{answer}\n{{% endif %}}"
    )


def save(parts: Parts, folder: Path, *, seed: int, end_token_weight: float) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = parts.model()
        # The usual 0.02 leaves logits nearly flat: greedy choices would hang on rounding. Wider weights decide clearly.
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim >= 2:
                    parameter.normal_(std=0.2)
            model.get_input_embeddings().weight.mul_(parts.embedding_std / 0.2)
            if end_token_weight:
                head = model.lm_head.weight
                head[parts.ends[0]] = head.sum(dim=0) * end_token_weight
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        eos_token_id=list(parts.ends),
        pad_token_id=parts.pad,
        do_sample=True,  # hub checkpoints ship sampling defaults; a request's own temperature must win
        temperature=0.01,
        top_k=1,
        top_p=0.001,
    )
    model.save_pretrained(folder)
    parts.processor.save_pretrained(folder)
    return folder
