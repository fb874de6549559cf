import torch
import torch.nn.functional as F

from services.trainer.methods import build
from services.trainer.training.data import RunTexts
from services.trainer.training.prototypes import TextTable
from services.trainer.training.randomness import generator
from shared.clip.loading import encode_text, encode_tokens
from tests.unit.trainer.fine_tuning import features_of


def test_a_prototype_is_the_normalised_mean_over_every_caption_of_the_class(tiny, balls):
    ours = features_of(tiny, build("mmft", {}), balls).prototypes
    for c, name in enumerate(balls.class_names):
        captions = [
            f"a photo of a {name}. {caption}"
            for label, own in zip(balls.labels.tolist(), balls.captions, strict=True)
            if label == c
            for caption in own
        ]
        assert len(captions) > len(set(captions)) or c == 1  # repeats count as often as they occur
        torch.testing.assert_close(ours[c], F.normalize(encode_text(tiny, captions).mean(0), dim=-1))


def test_embeddings_come_back_in_the_order_given(tiny):
    texts = ["a long text about a cat sitting on a mat in the sun", "a", "a dog on a rug", "b c d e f g"]
    table = TextTable(tiny, texts + texts[:1])
    assert len(table.tokens) == 4  # each text once
    rows = table.rows([texts[2], texts[0]])
    with torch.no_grad():
        alone = [tiny.model.encode_text(tiny.tokenizer([texts[i]]), normalize=True)[0] for i in (2, 0)]
    torch.testing.assert_close(encode_tokens(tiny.model, table.tokens[rows]), torch.stack(alone))


def test_draws_are_even_over_an_images_own_texts(tiny, balls):
    texts = RunTexts(tiny, build("mmft", {}), balls)
    bare, rich = 0, 3  # image 0 has no caption, image 3 has three
    images = torch.tensor([bare] * 50 + [rich] * 600)
    drawn = texts.table.tokens[texts.draw(images, generator(0, "draw"))]
    assert torch.equal(drawn[:50], texts.table.tokens[texts.table.rows(["a photo of a red ball."] * 50)])
    expected = {f"a photo of a red ball. It is red ball number {k}." for k in range(3)}
    shares = [
        (drawn[50:] == texts.table.tokens[texts.table.rows([text])]).all(1).double().mean() for text in sorted(expected)
    ]
    assert sum(shares) == 1
    assert all(0.25 < share < 0.42 for share in shares)
