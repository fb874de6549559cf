"""A model's answer as plain sentences on one line: the caption and nothing around it."""

import re

# What no text column and no UTF-8 can hold, and control characters; the line breaks among these stay.
_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")
_CONTROL = re.compile("[\x01-\x08\x0e-\x1f\x7f\ufeff]")

_MARKUP = re.compile(r"</?(?:br|p|b|i|em|strong|ul|ol|li|h[1-6])\s*/?>", re.IGNORECASE)
# Each of these goes over a text once, whatever it is: what a group has taken it never gives back to be tried again.
_LINK = re.compile(r"!?\[((?:(?![\[\]])[\W\d_])*+[^\W\d_][^\[\]]*+)\]\([^()\s]*+\)")
_UNDERLINED = re.compile(r"(?<!\w)_++(?=\S)|(?<![\s_])_++(?!\w)")  # at a word's edge; snake_case stays
_EMPHASIS = re.compile(r"[*`]+|~~+")
_FENCE = re.compile(r"^\s*+(?:`{3,}+|~{3,}+)\s*+(?:text|txt|plaintext|markdown|md|json|html)?\s*+$", re.IGNORECASE)
_RULE = re.compile(r"^[\s|:=+*_-]*$")  # a table's or a heading's line, or an empty one
_ITEM = re.compile(r"^\s*(?:(?:[-*+\u2022\u2023\u25aa\u25e6\u00b7\u2013\u2014]|\(?\d{1,2}[.)]|#{1,6})\s+)+|(?=\*\*|__)")
_QUOTATION = re.compile(r"^\s*(?:>\s?)+")
_CELLS = re.compile(r" ?\| ?")

_QUOTES = {'"': '"', "'": "'", "\u201c": "\u201d", "\u201e": "\u201c", "\u2018": "\u2019", "\u00ab": "\u00bb"}
_QUOTED = re.compile(f"([{''.join(_QUOTES)}])(.*)([{''.join(_QUOTES.values())}])(\\.?)", re.DOTALL)
_DOUBLE = '"\u201c\u201d\u201e\u00ab\u00bb'

_PICTURE = r"(?:image|photo|photograph|picture|snapshot|illustration|close[- ]?up)"
_GIVEN = r"(?:(?:provided|given|attached|above|uploaded|close[- ]?up|colou?r)\s+)?"
_WHICH = r"(?:visual|visible|shape|texture|textural|colou?r|context|contextual|spatial|petals?|symbols?)"
_WEIGHT = r"(?:primary|main|key|most|notable|distinctive|distinguishing|defining|characteristic)"
_TRAITS = r"(?:characteristics?|features?|traits?|attributes?)"
_SAYS = (
    r"(?:shows?|depicts?|features?|displays?|presents?|portrays?|captures?|showcases?|illustrates?|contains?|reveals?|"
    r"highlights?)"
)
_OPENINGS = [
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        # Sure! Here is a description of the photo:
        r"(?:sure|certainly|of course|absolutely|okay|ok|great|understood)(?:\s+thing)?\s*[!,.:]+(?:\s+|$)",
        r"here(?:'s|\u2019s| is| are)\b[^.:!?]{0,80}\b(?:captions?|descriptions?|summary|answer|sentences?|overview|"
        rf"response|{_TRAITS})\b[^.:!?]{{0,80}}:\s*",
        # Caption: / Primary visual characteristics:
        rf"(?:(?:{_PICTURE}|short|final|{_WEIGHT}|{_WHICH})\s+){{0,3}}(?:caption|description|answer|output|response|"
        rf"{_TRAITS})\s*:\s*",
        # Based on the photo of the cat, / In this image, / In the photo there is
        r"(?:in|based on|from|as (?:seen|shown|depicted) in|looking at|judging (?:by|from)|according to)\s+"
        rf"(?:the|this|your)\s+{_GIVEN}{_PICTURE}(?:\s+(?:provided|shown|given|above))?"
        r"(?:(?:\s+of\s+[^,.:!?]{1,60})?\s*[,:]\s*|\s+(?=(?:an?|the|there|we|you|one)\b))",
        r"(?:we|you|one)\s+can\s+(?:clearly\s+)?see\s+(?:that\s+)?",
        # The primary shape characteristics of this cat are:
        rf"(?:the\s+|its\s+|some\s+)?(?:{_WEIGHT}\s+)*(?:{_WEIGHT}|{_WHICH})\s+{_TRAITS}\s+(?:of|in|that)\b"
        r"[^.:!?]{0,100}?\s(?:are|is|includes?|consists? of)(?::\s*|\s+)",
        # The image shows / A close-up depicts / This photo of the cat shows is left: it may say more
        rf"(?:(?:the|this|an?)\s+)?{_GIVEN}{_PICTURE}\s+(?:clearly\s+|prominently\s+)?{_SAYS}\s+(?:that\s+)?",
        # This is a photo of / The image is of / A picture of a
        rf"(?:this|it)\s+is\s+(?:an?|the)\s+{_GIVEN}{_PICTURE}\s+(?:of|showing|depicting|featuring)\s+",
        rf"(?:the|this)\s+{_GIVEN}{_PICTURE}\s+is\s+of\s+",
        rf"(?:an?\s+)?{_GIVEN}(?:image|photo|photograph|picture)\s+of\s+(?=(?:an?|the|two|three|some)\b)",
    )
]


def storable(text: str) -> str:
    """The text as a database can hold it: NUL and lone surrogates become spaces."""
    return _UNSTORABLE.sub(" ", text)


def clean(raw: str) -> str:
    """No markdown, no quotes around, no list, no "Sure! Here is", no "The image shows"; first letter upper case, single
    spaces, a full stop after a last letter. Doing it twice changes nothing. Only boilerplate alone becomes "".

    A text that begins twice ("Caption: The image shows ...") loses one layer a round; each round but the last shortens
    the text or ends it with its full stop, so the rounds end."""
    text = _plain(_CONTROL.sub(" ", storable(raw)))
    while (shorter := _plain(_bare(text))) != text:
        text = shorter
    return text


def _plain(text: str) -> str:
    """Markdown to sentences. Letters are never lost, apart from a link's address."""
    text = _LINK.sub(r"\1", _MARKUP.sub("\n", text))
    if "_" in text:
        text = _UNDERLINED.sub("", text)
    sentences: list[str] = []
    goes_on = False  # does the next plain line continue the sentence before it
    for line in text.splitlines():
        if _FENCE.match(line) or _RULE.match(line):
            goes_on = False
            continue
        line = _QUOTATION.sub("", line)
        item, row = _ITEM.match(line), line.count("|") > 1
        words = line[item.end() :] if item else line
        if row:
            words = _CELLS.sub(", ", " ".join(words.strip(" |").split()))
        words = " ".join(_EMPHASIS.sub("", words).split())
        if not words:
            continue
        if goes_on and not item and not row:
            sentences[-1] += f" {words}"
        else:
            if sentences:
                sentences[-1] = _ended(sentences[-1])
            sentences.append(_capital(words) if item or row else words)
        goes_on = True
    return " ".join(sentences)


def _bare(text: str) -> str:
    """Without the outermost layer of what is not the caption itself."""
    text = _unquoted(text)
    for opening in _OPENINGS:
        if found := opening.match(text):
            text = text[found.end() :]
    return _ended(_capital(text.strip()))


def _unquoted(text: str) -> str:
    """Without a pair of quotes around all of it, or the one quote that lost its partner to a cut."""
    pair = _QUOTED.fullmatch(text)
    if pair and _QUOTES[pair[1]] == pair[3] and (pair[1] in "'\u2018" or not {pair[1], pair[3]} & set(pair[2])):
        inner = pair[2]
        if pair[1] == pair[3]:  # all of the pairs at once, lest thousands of them take as many rounds
            left, right = inner.lstrip(pair[1]), inner.rstrip(pair[1])
            more = min(len(inner) - len(left), len(inner) - len(right), len(inner) // 2)
            inner = inner[more : len(inner) - more]
        return inner.strip() + (pair[4] if inner[-1:].isalnum() else "")
    marks = [letter for letter in text if letter in _DOUBLE]
    return text.strip(marks[0]).strip() if len(marks) == 1 else text


def _capital(text: str) -> str:
    upper = text[:1].upper()
    return upper + text[1:] if len(upper) == 1 else text


def _ended(sentence: str) -> str:
    return f"{sentence}." if sentence[-1:].isalpha() else sentence
