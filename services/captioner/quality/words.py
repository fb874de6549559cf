"""Captions as words, and the class names among them."""

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

_WORD = re.compile(r"[^\W_]+")
MASK = "_"  # no word of a text is this

#: By language: frequent words that carry grammar, not content. Those that are English words too ("die", "son", "met")
#: stand for English alone or are left out.
FUNCTION_WORDS: Mapping[str, frozenset[str]] = {
    language: frozenset(text.split())
    for language, text in {
        "en": "a an and are as at be but by for from has have in into is it its of on or over that the their there this"
        " to toward which while with",
        "de": "auf auch aus das dem der des ein eine einem einen einer es f\u00fcr im ist mit nicht sich sind und von"
        " zu zur",
        "fr": "au aux avec ce ces cette dans des du elle en est et il la le les leur ou pas qui sa sans ses sont sur un"
        " une",
        "es": "al con del el en es esta este la las los m\u00e1s muy para por que se su sus tiene un una y",
        "it": "che con dei del della di e gli il la le lo nel nella pi\u00f9 si sono su un una \u00e8",
        "pt": "ao com da das de do dos e em mais na n\u00e3o o os para por que se seu sua um uma \u00e9",
        "nl": "aan bij dat de deze een en het maar naar niet ook op te uit voor wordt zijn",
    }.items()
}
#: As a class's name these say nothing: any caption may hold them as a property ("orange fur" is no orange).
_COLOURS = (
    "amber aqua azure beige black blue bronze brown burgundy caramel cherry chestnut chocolate cinnamon copper coral"
    " cream crimson cyan ebony emerald fawn ginger gold golden gray green grey indigo ivory khaki lavender lemon"
    " lilac lime magenta maroon mauve mint mustard navy olive orange peach pink plum purple red rose ruby rust"
    " salmon sand scarlet silver slate tan taupe teal turquoise violet white yellow"
)
COLOURS = frozenset(_COLOURS.split())


def words(text: str) -> list[str]:
    """Runs of letters and digits, case folded: "St. Bernard's" -> st, bernard, s."""
    return _WORD.findall(text.casefold())


class Names:
    """The display names of a data set's classes, found in a text as whole words, singular or plural. One dictionary
    look-up per word of the text, however many the classes. Case, hyphens and punctuation do not matter."""

    def __init__(self, display_names: Iterable[str]) -> None:
        names = {name for name in map(_sequence, display_names) if _distinctive(name)}
        self._name_of = {form: name for name in names for form in _forms(name)} | {name: name for name in names}
        self._longest: dict[str, int] = {}
        for form in self._name_of:
            self._longest[form[0]] = max(len(form), self._longest.get(form[0], 0))

    def another(self, own: str, found: Sequence[str]) -> bool:
        """Do these words name a class that is not `own`? A name inside the own one ("retriever" of "golden retriever")
        and the own name itself, wherever it covers another's, do not count."""
        if self._longest.keys().isdisjoint(found):
            return False  # nearly every caption: no word of it begins a name
        name = _sequence(own)
        forms = _forms(name)
        at = 0
        while at < len(found):
            longest = self._longest.get(found[at], 0)
            if name and found[at] == name[0]:
                longest = max(longest, len(name))
            step = 1
            for length in range(min(longest, len(found) - at), 0, -1):
                part = tuple(found[at : at + length])
                other = self._name_of.get(part)
                if part in forms or (other is not None and self._inside(other, name)):
                    step = length
                    break
                if other is not None:
                    return True
            at += step
        return False

    def _inside(self, other: tuple[str, ...], name: tuple[str, ...]) -> bool:
        spans = (name[i : i + len(other)] for i in range(len(name) - len(other) + 1))
        return any(span == other or self._name_of.get(span) == other for span in spans)


def mentions(own: str, found: Sequence[str]) -> bool:
    """Do these words hold the name, or at least its last word? Singular and plural are the same. True for a name
    without a letter or digit: nothing could be found of it."""
    name = _sequence(own)
    return not name or not _last(name).isdisjoint(found)


def masked(own: str, found: Sequence[str]) -> list[str]:
    """The words with the own name, or its last word alone, replaced by MASK, and "an" by "a": what is left of a caption
    to compare with another class's."""
    name = _sequence(own)
    forms = _forms(name)
    last = _last(name) if name else frozenset()
    out: list[str] = []
    at = 0
    while at < len(found):
        if name and tuple(found[at : at + len(name)]) in forms:
            out.append(MASK)
            at += len(name)
        else:
            out.append(MASK if found[at] in last else "a" if found[at] == "an" else found[at])
            at += 1
    return out


@lru_cache(4096)
def _sequence(name: str) -> tuple[str, ...]:
    return tuple(words(name))


@lru_cache(4096)
def _forms(name: tuple[str, ...]) -> frozenset[tuple[str, ...]]:
    return frozenset((*name[:-1], last) for last in _plurals(name[-1])) if name else frozenset()


def _plurals(word: str) -> tuple[str, ...]:
    return (word, f"{word}s", f"{word}es", *([f"{word[:-1]}ies"] if word.endswith("y") else []))


@lru_cache(4096)
def _last(name: tuple[str, ...]) -> frozenset[str]:
    word = name[-1]
    singular = word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word
    return frozenset((*_plurals(word), singular))


def _distinctive(name: tuple[str, ...]) -> bool:
    """Not a name that any text may hold by chance: a single letter, one or two digits, "a", "on", a colour."""
    if len(name) != 1:
        return bool(name)
    word = name[0]
    return len(word) > (2 if word.isdigit() else 1) and word not in FUNCTION_WORDS["en"] | COLOURS
