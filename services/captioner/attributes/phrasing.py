"""Measurements into sentences. Every statement is a threshold on a number; the wording varies by the seed, the facts do
not. American spelling, as the prompts have it. Nothing opens with "The image": CLIP's tokens are too few for that."""

import random
import re
from collections.abc import Sequence

from services.captioner.attributes.measure import Measurement
from services.captioner.attributes.regions import Silhouette
from services.captioner.attributes.texture import Texture

MAX_TOKENS = 60  # of CLIP's 77; the rest is for "a photo of a {class}."
KNOWN = ("visual", "shape", "texture", "color")


def phrase(
    m: Measurement, name: str, characteristic: str, tag: str | None, words: int, max_tokens: int, rng: random.Random
) -> str:
    """The caption of one picture for one characteristic ("visual", "shape", "texture", "color"; any other gets a
    general description), in at most `words` words and `max_tokens` CLIP tokens by estimate."""
    kind = tag if tag is not None and not _says_the_same(tag, name) else None
    if characteristic == "shape":
        sentences = _shape(m, name, kind, rng)
    elif characteristic == "texture":
        sentences = _texture(m, name, rng)
    elif characteristic == "color":
        sentences = _color(m, name, rng)
    else:
        sentences = _visual(m, name, kind, rng)
        if characteristic != "visual":
            sentences = [sentences[0], _place(m, rng), *sentences[1:]]
    return _fit(sentences, words, min(max_tokens, MAX_TOKENS))


def estimate_tokens(text: str) -> int:
    """About what CLIP's tokenizer counts, without the two special tokens: long words are usually split in two."""
    return sum(1 + (len(piece) > 9) for piece in re.findall(r"[A-Za-z]+|\d|[^\sA-Za-z\d]", text))


def _visual(m: Measurement, name: str, kind: str | None, rng: random.Random) -> list[str]:
    sentences = [_opening(m, name, rng)]
    if kind:
        sentences.append(_pick(rng, f"It is recognizable as {_a(kind)}", f"It looks like {_a(kind)}"))
    light = [_vividness(m), _contrast(m.surface, rng)]
    sentences.append(_pick(rng, f"{light[0]} with {light[1]}", f"{light[1]}, {light[0]}"))
    if m.region == "whole":
        sentences += [_whole_balance(m), _grain(m.surface, rng)]
    else:
        sentences += [f"{_proportion(m.shape, rng)}, with {_grain(m.surface, rng)}", _place(m, rng)]
    return sentences


def _color(m: Measurement, name: str, rng: random.Random) -> list[str]:
    sentences = [_opening(m, name, rng), f"{_vividness(m)}, {_brightness(m.lightness)}"]
    if len(m.subject) > 1:
        parts = [f"{color} about {_percent(share)}" for color, share in m.subject[:3]]
        where = "of the picture's middle" if m.region == "whole" else "of it"
        sentences.append(f"{_join(parts)} {where}")
    sentences.append(_contrast(m.surface, rng))
    return sentences


def _shape(m: Measurement, name: str, kind: str | None, rng: random.Random) -> list[str]:
    s = m.shape
    if m.region == "whole":
        frame = "a wide frame" if m.frame > 1.15 else "a tall frame" if m.frame < 0.87 else "a nearly square frame"
        sentences = [
            _pick(
                rng,
                f"{_cap(_a(name))} in {frame}, without a clear outline against its surroundings",
                f"{_cap(name)} in {frame}, its contour merging with what surrounds it",
            ),
            _direction(m.surface),
            _whole_balance(m),
        ]
        return [*sentences[:1], *([f"Its form is that of {_a(kind)}"] if kind else []), *sentences[1:]]
    sentences = [
        _pick(
            rng,
            f"{_cap(_a(name))} with {_outline(s, rng)}, {_proportion(s, rng)}",
            f"The {name} has {_outline(s, rng)} and is {_proportion(s, rng)}",
            f"{_cap(_proportion(s, rng))}, the {name} has {_outline(s, rng)}",
        )
    ]
    if kind:
        sentences.append(_pick(rng, f"Its form is that of {_a(kind)}", f"The silhouette suggests {_a(kind)}"))
    details = []
    if s.elongation > 1.7 and 25 < abs(s.angle) < 65:
        details.append("leaning diagonally, " + ("upper right" if s.angle > 0 else "upper left") + " end high")
    if s.symmetry > 0.88:
        details.append("left and right sides mirror each other")
    elif s.symmetry < 0.6:
        details.append("left and right sides differ")
    if s.parts > 1 and m.region == "plain":
        details.append("in two separate parts" if s.parts == 2 else "in several separate parts")
    if s.holes > 0.04:
        details.append("open gaps inside")
    if s.symmetry > 0.75 or s.aspect < 1.3:
        details.append(
            "widest near the top"
            if s.widest < 0.33
            else "widest near the bottom"
            if s.widest > 0.67
            else "widest midway"
        )
    if details:
        sentences.append(_join(details[:3]))
    sentences.append(_place(m, rng))
    return sentences


def _texture(m: Measurement, name: str, rng: random.Random) -> list[str]:
    t = m.surface
    owner = f"the {name} and its surroundings" if m.region == "whole" else f"the {name}"
    sentences = [
        _pick(
            rng,
            f"{_cap(_grain(t, rng))} on {owner}, {_contrast(t, rng)}",
            f"{_cap(owner)} shows {_grain(t, rng)} and {_contrast(t, rng)}"
            if m.region != "whole"
            else f"{_cap(owner)} show {_grain(t, rng)} and {_contrast(t, rng)}",
        )
    ]
    marks = _marks(t)
    if marks:
        sentences.append(marks)
    if t.period:
        sentences.append("A pattern repeats at regular intervals")
    edges = "crisp, hard edges" if t.sharpness > 0.7 else "soft, gradual edges" if t.sharpness < 0.36 else "clear edges"
    sentences.append(f"{_cap(edges)}, {_direction(t)}")
    colors = _colors(m.subject, rng)
    if m.region == "whole":
        sentences.append(f"{colors} tones")
    else:
        behind = "a plain" if m.region == "plain" else "a busy" if m.background_edges > 0.3 else "an uneven"
        area = "surface" if m.region == "plain" else "area that stands out"
        sentences.append(f"The {area} is {colors}, before {behind} {m.background[0][0]} background")
    return sentences


def _opening(m: Measurement, name: str, rng: random.Random) -> str:
    colors, behind = _colors(m.subject, rng), _join([color for color, _ in m.background[:2]])
    if m.region == "plain":
        ground = m.background[0][0]
        return _pick(
            rng,
            f"{_cap(_a(name))}, {colors}, on a plain {ground} background",
            f"{_cap(_described(colors, name))} against an even {ground} background",
            f"On plain {ground}, {_a(name)} that is {colors}",
        )
    if m.region == "separated":  # says what stands out, which need not be all of the subject
        return _pick(
            rng,
            f"{_cap(_a(name))}, {colors} standing out from {behind} surroundings",
            f"{_cap(_a(name))} with {colors} in front of {behind}",
            f"Against {behind}, {_a(name)} in {colors}",
        )
    if {color for color, _ in m.subject[:2]} == {color for color, _ in m.background[:2]}:
        return _pick(rng, f"{_cap(_a(name))} in a picture of {colors} tones", f"{_cap(colors)} tones around {_a(name)}")
    return _pick(
        rng,
        f"{_cap(_a(name))} amid {colors} tones, {behind} toward the edges",
        f"{_cap(colors)} in the middle and {behind} around: {_a(name)}",
    )


def _colors(palette: Sequence[tuple[str, float]], rng: random.Random) -> str:
    names = [color for color, _ in palette[:4]]
    first = palette[0][1]
    if len(names) == 1 or first > 0.85:
        return _pick(rng, f"almost entirely {names[0]}", f"nearly all {names[0]}")
    if first > 0.5:
        return f"mostly {names[0]} with {_join(names[1:3])}"
    return _join(names[:3])


def _described(colors: str, name: str) -> str:
    """'mostly red with black' + 'insect' -> 'mostly red insect with black'."""
    first, between, rest = colors.partition(" with ")
    return f"{first} {name}{between}{rest}"


def _vividness(m: Measurement) -> str:
    if m.chroma > 55:
        return "very vivid colors"
    if m.chroma > 32:
        return "strong colors"
    if m.chroma > 16:
        return "moderate colors"
    if m.chroma < 12 and m.chroma_high > 40:
        return "small areas of strong color"
    return "muted colors" if m.chroma > 7 or m.chroma_high > 20 else "hardly any color"


def _brightness(lightness: float) -> str:
    steps = ((82, "very bright overall"), (64, "bright overall"), (42, "medium bright"), (25, "dark overall"))
    return next((text for limit, text in steps if lightness > limit), "very dark overall")


def _contrast(t: Texture, rng: random.Random) -> str:
    if t.contrast > 70:
        return _pick(rng, "very strong contrast of light and dark", "stark light and dark")
    if t.contrast > 48:
        return _pick(rng, "strong contrast", "marked lights and shadows")
    if t.contrast > 26:
        return _pick(rng, "moderate contrast", "gentle lights and shadows")
    return _pick(rng, "low contrast", "hardly any shading")


def _grain(t: Texture, rng: random.Random) -> str:
    if t.flat > 0.75:
        return _pick(rng, "smooth, flat areas", "plain, even surfaces")
    if t.flat > 0.5:
        return _pick(rng, "largely smooth surfaces with a few details", "mostly even areas with some detail")
    if t.contrast > 26 and t.fineness > 0.52:
        return _pick(rng, "fine, dense detail", "a finely grained surface")
    if t.edges > 0.4:
        return _pick(rng, "dense, busy detail", "a richly detailed surface")
    if t.fineness < 0.36:
        return _pick(rng, "soft, broad patches", "large, gently shaded patches")
    return _pick(rng, "medium-sized markings", "a moderately detailed surface")


def _marks(t: Texture) -> str | None:
    if t.contrast < 26 or t.flat > 0.7 or t.dark + t.light < 0.25:
        return None
    if t.dark > 1.6 * t.light:
        return "Dark patches on a lighter ground"
    if t.light > 1.6 * t.dark:
        return "Light patches on a darker ground"
    return "Light and dark patches alternate"


def _direction(t: Texture) -> str:
    if t.coherence < 0.15:
        return "lines run in all directions"
    strength = "mainly" if t.coherence > 0.35 else "slightly more often"
    if abs(t.angle) < 22:
        return f"lines run {strength} horizontally"
    if abs(t.angle) > 68:
        return f"lines run {strength} vertically"
    return f"lines run {strength} diagonally, rising to the {'right' if t.angle > 0 else 'left'}"


def _proportion(s: Silhouette, rng: random.Random) -> str:
    long = max(s.aspect, 1 / s.aspect)
    size = "slightly" if long < 1.35 else "one and a half times" if long < 1.75 else "twice" if long < 2.5 else None
    if long < 1.12:
        return _pick(rng, "about as wide as tall", "equally wide and tall")
    if size == "slightly":
        return "slightly wider than tall" if s.aspect > 1 else "slightly taller than wide"
    if size is None:
        return _pick(rng, "long and low", "far wider than tall") if s.aspect > 1 else "tall and narrow"
    return f"about {size} as wide as tall" if s.aspect > 1 else f"about {size} as tall as wide"


def _outline(s: Silhouette, rng: random.Random) -> str:
    if s.cut and s.area > 0.75:
        return "an outline that fills the frame"
    if s.fill > 0.92:
        return _pick(rng, "a rectangular, blocky outline", "straight, boxy contours")
    if 0.4 < s.fill < 0.65 and s.solidity > 0.88 and not 0.2 < s.widest < 0.8:
        return _pick(rng, "a triangular outline", "a contour like a triangle") + (
            ", apex down" if s.widest < 0.2 else ""
        )
    if s.oval > 0.88:
        return "a round outline" if 0.87 < s.aspect < 1.15 else _pick(rng, "an oval outline", "a rounded, oval contour")
    if s.solidity > 0.9:
        return _pick(rng, "a compact outline without deep notches", "a closed, solid contour")
    if s.solidity > 0.75:
        return _pick(rng, "an irregular outline with some notches", "an uneven contour with parts that stick out")
    return _pick(rng, "a branching outline with wide gaps", "a thin, open contour with many gaps")


def _place(m: Measurement, rng: random.Random) -> str:
    if m.region == "whole":
        return _whole_balance(m)
    s = m.shape
    steps = (
        (0.75, "nearly all"),
        (0.58, "two thirds"),
        (0.42, "about half"),
        (0.28, "about a third"),
        (0.15, "a fifth"),
    )
    share = next((text for limit, text in steps if s.area > limit), "a small part")
    x = "left of center" if s.centre[0] < 0.42 else "right of center" if s.centre[0] > 0.58 else ""
    y = "toward the top" if s.centre[1] < 0.4 else "toward the bottom" if s.centre[1] > 0.6 else ""
    where = " and ".join(part for part in (x, y) if part) or "centered"
    text = _pick(rng, f"It covers {share} of the frame, {where}", f"{_cap(where)}, it takes up {share} of the frame")
    if s.cut and m.region == "plain":
        text += f", reaching the {_join(list(s.cut[:2]))} edge{'s' if len(s.cut) > 1 else ''}"
    return text


def _whole_balance(m: Measurement) -> str:
    difference = m.lightness - m.backdrop
    if abs(difference) < 8:
        return "Middle and edges are equally bright"
    return f"The middle is {'lighter' if difference > 0 else 'darker'} than the edges"


def _says_the_same(tag: str, name: str) -> bool:
    return bool(set(tag.lower().split()) & set(name.lower().split()))


def _fit(sentences: Sequence[str], words: int, tokens: int) -> str:
    text = ""
    for sentence in sentences:
        longer = f"{text} {_cap(sentence)}.".strip()
        if text and (len(longer.split()) > words or estimate_tokens(longer) > tokens):
            continue  # a shorter one further on may still fit
        text = longer
    kept = text.split()[:words]
    while len(kept) > 1 and estimate_tokens(" ".join(kept)) > tokens:
        kept.pop()
    return text if len(kept) == len(text.split()) else " ".join(kept).rstrip(",.;") + "."


def _percent(share: float) -> str:
    return f"{max(5, round(share * 20) * 5)}%"


def _a(noun: str) -> str:
    return f"{'an' if noun[:1].lower() in 'aeiou' else 'a'} {noun}"


def _cap(text: str) -> str:
    return text[:1].upper() + text[1:]


def _join(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def _pick(rng: random.Random, *options: str) -> str:
    return options[rng.randrange(len(options))]
