"""What a caller sees of a text, and how much of it is certain before the text has ended."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from services.captioner.engines.hf_text import Stream, Transcript, opened_by, settled, visible


@pytest.mark.parametrize(
    ("raw", "stop", "opened", "text", "stopped"),
    [
        ("  a dog.\n", (), "", "a dog.", False),
        ("a dog. END more", ("END",), "", "a dog.", True),
        ("one two three", ("three", "two"), "", "one", True),
        ("\n\na dog\n\nand more", ("\n\n",), "", "a dog", True),
        ("<think>hm</think>a dog", (), "", "a dog", False),
        ("<think>hm</think>a <think>x\ny</think>dog", (), "", "a dog", False),
        ("a dog <think>is it", (), "", "a dog", False),
        ("◁think▷hm◁/think▷a dog", (), "", "a dog", False),
        ("<thinking>hm</thinking> a dog", (), "", "a dog", False),
        ("hm</think>a dog", (), "<think>", "a dog", False),
        ("hm, still", (), "<think>", "", False),
        ("<think>END</think>a dog END", ("END",), "", "a dog", True),
        ("I think <thin> lines", (), "", "I think <thin> lines", False),
        ("<Think>hm</THINK>a dog", (), "", "a dog", False),
        ("Is it?</think>\n\na dog", (), "", "a dog", False),
    ],
)
def test_what_a_caller_sees(raw: str, stop: tuple[str, ...], opened: str, text: str, stopped: bool) -> None:
    assert visible(raw, stop, opened) == (text, stopped)


@pytest.mark.parametrize(
    ("raw", "stop", "certain"),
    [
        ("a dog", (), "a dog"),
        ("a dog ", (), "a dog"),
        ("a dog <thi", (), "a dog"),
        ("a dog <THI", (), "a dog"),
        ("a dog </thi", (), "a dog"),
        ("a dog </think> is", (), "a dog  is"),
        ("a dog <th ", (), "a dog <th"),
        ("a dog\ufffd\ufffd", (), "a dog"),
        ("a dog. EN", ("END",), "a dog."),
        ("a dog. E", ("END", "dog. EX"), "a"),
        ("a dog. END x", ("END",), "a dog."),
    ],
)
def test_what_may_yet_change_is_held_back(raw: str, stop: tuple[str, ...], certain: str) -> None:
    assert settled(raw, stop) == certain


@pytest.mark.parametrize(
    ("prompt", "opened"),
    [
        ("assistant\n", ""),
        ("assistant\n<think>\n", "<think>"),
        ("assistant\n<think>\n\n</think>\n\n", ""),
        ("say <think>\nassistant\n◁think▷", "◁think▷"),
        ("assistant\n<THINK>\n", "<think>"),
    ],
)
def test_a_thought_that_the_prompt_begins(prompt: str, opened: str) -> None:
    assert opened_by(prompt) == opened


PIECES = st.sampled_from(
    [
        *("a", "b", " ", "\n", "é", "<", "<think>", "</think>", "thi", "nk>", "ab", "\ufffd", "◁think▷", "◁/think▷"),
        *("ba", "THI", "İ", "NK>", "</"),
    ]
)
STOPS = st.lists(st.sampled_from(["ab", "b ", "\n", "aab", "<", "é", "nk>b"]), max_size=3).map(tuple)


@given(st.lists(PIECES, max_size=14), STOPS, st.sampled_from(["", "<think>"]))
def test_whatever_is_certain_stays_true(pieces: list[str], stop: tuple[str, ...], opened: str) -> None:
    known, raw = "", ""
    for piece in pieces:
        raw += piece
        certain = settled(raw, stop, opened)
        assert certain.startswith(known)
        known = certain
        if visible(raw, stop, opened, sent=True)[1]:
            break  # the row ends here
    text, stopped = visible(raw, stop, opened, sent=True)
    assert text.startswith(known)
    if not stopped:
        assert not any(string in text for string in stop)


# Token by token, with one token for each byte


ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())


class Bytes:
    """A tokenizer with a token for each byte."""

    def __init__(self) -> None:
        self._tokenizer = Tokenizer(models.BPE({letter: n for n, letter in enumerate(ALPHABET)}, []))
        self._tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        self._tokenizer.decoder = decoders.ByteLevel()

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text).ids)

    def decode(self, ids: list[int], *, skip_special_tokens: bool) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens))


BYTES = Bytes()
END = 256


def follow(ids: list[int], stop: tuple[str, ...] = (), limit: int = 1000) -> tuple[Transcript, list[str]]:
    pieces: list[str] = []
    transcript = Transcript(BYTES, {END}, limit, stop, "", Stream(pieces.append))
    for token in ids:
        if transcript.add(token):
            break
    return transcript, pieces


def test_a_text_is_sent_as_it_is_written_in_whole_characters() -> None:
    transcript, pieces = follow([*BYTES.encode("  né ◁think▷ 日本◁/think▷ 日"), END])
    assert pieces == ["n", "é", "  日"]
    assert transcript.text() == "né  日"
    assert not transcript.stopped


def test_a_thought_without_a_beginning_goes_where_nothing_was_sent_of_it() -> None:
    ids = [*BYTES.encode("hm</think> a dog"), END]
    transcript, pieces = follow(ids)
    assert ("".join(pieces), transcript.text()) == ("hm a dog", "hm a dog"), "what was sent cannot be taken back"
    unsent = Transcript(BYTES, {END}, 1000, ("STOP",))
    for token in ids:
        unsent.add(token)
    assert unsent.text() == "a dog"


def test_a_row_ends_with_the_token_that_completes_a_stop_string() -> None:
    transcript, pieces = follow(BYTES.encode("a dog. STOP and more"), ("STOP",))
    assert "".join(pieces) == "a dog."
    assert (transcript.text(), transcript.stopped, transcript.tokens) == ("a dog.", True, len("a dog. STOP"))


def test_a_row_ends_at_its_limit_its_end_token_or_where_the_model_failed() -> None:
    ids = BYTES.encode("a dog")
    for transcript, tokens in (
        (follow(ids, limit=3)[0], 3),
        (follow([*ids, END, *ids])[0], 6),
        (follow([*ids, -1, *ids])[0], 6),
    ):
        assert transcript.tokens == tokens
        assert "a dog".startswith(transcript.text())


@given(st.binary(max_size=24), STOPS)
def test_pieces_are_a_beginning_of_the_text_whatever_the_bytes(data: bytes, stop: tuple[str, ...]) -> None:
    ids = [token for byte in data for token in BYTES_OF[byte]]
    transcript, pieces = follow(ids, stop)
    assert transcript.text() == visible(data[: transcript.tokens].decode(errors="replace"), stop, sent=True)[0]
    assert transcript.text().startswith("".join(pieces))


#: byte -> its token: letters of the alphabet stand for bytes in the order that GPT-2's byte map gives them
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_LETTERS = {byte: chr(byte) for byte in _PRINTABLE} | {
    byte: chr(256 + n) for n, byte in enumerate(byte for byte in range(256) if byte not in _PRINTABLE)
}
BYTES_OF = {byte: [ALPHABET.index(letter)] for byte, letter in _LETTERS.items()}


def test_a_second_try_goes_on_where_the_first_ended() -> None:
    pieces: list[str] = []
    stream = Stream(pieces.append)
    for text in ("a", "a dog", "a", "a do", "a dog is", "a cat is there"):
        stream.send(text)
    assert pieces == ["a", " dog", " is"]
    assert stream.sent == "a dog is"


def test_a_receiver_that_fails_hurts_nobody() -> None:
    calls: list[str] = []

    def receive(piece: str) -> None:
        calls.append(piece)
        raise RuntimeError("gone")

    stream = Stream(receive)
    stream.send("a")
    stream.send("a dog")
    assert calls == ["a"]
