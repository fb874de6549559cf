from itertools import permutations

from services.trainer.methods.caption_texts import first_captions, with_sentences
from shared.sentences import sentences


def test_the_first_captions_do_not_depend_on_the_order_they_come_in():
    captions = ["A cat.", "A dog.", "A bird.", "A fish."]
    for count in (1, 2, 3, 4, 9):
        chosen = {tuple(first_captions(order, count)) for order in permutations(captions)}
        assert len(chosen) == 1
        assert len(*chosen) == min(count, 4)
    assert first_captions(captions, 2) == first_captions(captions, 3)[:2]
    assert first_captions(captions, None) == captions


def test_over_many_images_no_place_is_favoured():
    images = [[f"Image {i}, caption {k}." for k in range(3)] for i in range(300)]
    first = [captions.index(*first_captions(captions, 1)) for captions in images]
    assert all(70 < first.count(k) < 130 for k in range(3))


def test_sentences_of_a_caption_stand_beside_it():
    text = "It is a St. Bernard. Its coat is 2.5 cm long! No stop"
    assert sentences(text) == ["It is a St. Bernard.", "Its coat is 2.5 cm long!", "No stop"]
    assert sentences("") == []
    assert with_sentences([text, "One sentence."]) == [text, *sentences(text), "One sentence."]
