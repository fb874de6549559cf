"""shared/clip/text_tower.py against open_clip's own `encode_text` on all 77 tokens."""

from typing import Any

import open_clip
import pytest
import torch
from open_clip.model import CustomTextCLIP
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor

from shared.clip.loading import encode_tokens
from shared.clip.text_tower import encode_text_batch, trim_padding, used_columns
from tests.tiny_clip import tiny_config

TEXTS = ["a cat", "a photo of a small brown dog that lies on a green lawn.", "b", "words " * 90]
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 3}


def model(*, custom: bool = False, **text: Any) -> Any:
    """A text tower with weights large enough that every token counts."""
    torch.manual_seed(0)
    config = tiny_config()["model_cfg"] | {"text_cfg": TEXT | text}
    made = (CustomTextCLIP if custom else open_clip.CLIP)(**config).eval()
    with torch.no_grad():
        for name, value in made.named_parameters():
            if "visual" not in name and value.ndim >= 1:
                value.mul_(3).add_(0.1 * torch.randn_like(value))
    return made


def tokens(texts: list[str] = TEXTS) -> Tensor:
    found: Tensor = SimpleTokenizer()(texts, context_length=77)
    return found


CAUSAL = [
    {},
    {"custom": True},
    {"custom": True, "pool_type": "eos", "eos_id": 49407},
    {"custom": True, "proj_bias": True},
    {"custom": True, "proj_type": "none", "width": 16},
    {"pool_type": "eos", "eos_id": 49407},
]


@pytest.mark.parametrize("kind", CAUSAL)
def test_short_texts_give_the_full_lengths_embeddings(kind: dict[str, Any]) -> None:
    made, given = model(**kind), tokens(TEXTS[:3])
    seen: list[tuple[int, ...]] = []
    made.get_submodule("text" if "custom" in kind else "").transformer.register_forward_pre_hook(
        lambda _, inputs: seen.append(tuple(inputs[0].shape[:2]))
    )
    ours = encode_text_batch(made, given)
    theirs = made.encode_text(given, normalize=True)
    assert seen == [(3, 16), (3, 77)]
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
    assert (theirs[0] - theirs[1]).abs().max() > 1e-2, "the texts are told apart"


@pytest.mark.parametrize("kind", CAUSAL)
def test_gradients_are_the_full_lengths(kind: dict[str, Any]) -> None:
    made, given = model(**kind), tokens(TEXTS[:3])
    weights = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
    parameters = {name: value for name, value in made.named_parameters() if "visual" not in name}
    (encode_text_batch(made, given) * weights).sum().backward()
    ours = {name: value.grad.clone() for name, value in parameters.items() if value.grad is not None}
    made.zero_grad()
    (made.encode_text(given, normalize=True) * weights).sum().backward()
    theirs = {name: value.grad for name, value in parameters.items() if value.grad is not None}
    assert ours.keys() == theirs.keys()
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-5, rtol=1e-4, msg=name)


def test_autocast_is_honoured() -> None:
    made, given = model(), tokens(TEXTS[:3])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = encode_text_batch(made, given), made.encode_text(given, normalize=True)
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, atol=2e-2, rtol=0)
    assert (ours - encode_text_batch(made, given)).abs().max() > 1e-5


@pytest.mark.parametrize(
    "kind",
    [
        {"custom": True, "no_causal_mask": True, "pool_type": "last"},  # SigLIP's
        {"custom": True, "no_causal_mask": True},
        {"custom": True, "embed_cls": True},  # CoCa's
        {"custom": True, "pool_type": "last"},
    ],
)
def test_towers_that_read_every_column_get_them(kind: dict[str, Any]) -> None:
    made, given = model(**kind), tokens(TEXTS[:3])
    if "embed_cls" in kind:
        given = given[:, :76]  # its class token takes a place
    assert trim_padding(made, given).shape == given.shape
    torch.testing.assert_close(encode_text_batch(made, given), made.encode_text(given, normalize=True))


def test_columns_used_end_with_the_end_token() -> None:
    assert used_columns(model(), tokens()).tolist() == [4, 16, 3, 77]
    assert trim_padding(model(), tokens()[:0]).shape == (0, 77)


@pytest.mark.parametrize("budget", [1, 40, 100_000])
def test_order_is_kept_whatever_is_encoded_together(budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shared.clip.text_tower.cpu_tokens", lambda: budget)
    monkeypatch.setattr("shared.clip.loading.cpu_tokens", lambda: budget)
    made, given = model(), tokens([*TEXTS, "c d e f g h", "a cat"])
    expected = made.encode_text(given, normalize=True)
    torch.testing.assert_close(encode_text_batch(made, given), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(encode_tokens(made, given), expected.detach(), atol=1e-6, rtol=0)


def test_bulk_encoding_batches_texts_of_like_length_within_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shared.clip.loading.cpu_tokens", lambda: 40)
    made = model()
    given = tokens(["a", "words " * 90, "a b", "a b c d e f g h", "a b c", "b"])  # 3, 77, 4, 10, 5, 3 tokens
    seen: list[tuple[int, ...]] = []
    made.transformer.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape[:2])))
    encode_tokens(made, given)
    assert seen == [(4, 5), (1, 10), (1, 77)]
