"""What the model is asked.

Source of the built-in prompt: MMFT (arXiv 2601.21426), one call per characteristic."""

import re
from difflib import get_close_matches

from shared.errors import InvalidInput
from shared.schemas.captions import BuiltIn, Template

PROMPT = (
    "To differentiate this {class_name} photo from other {domain} photos, describe its primary {characteristic} "
    "characteristics based on the photo in {words} words."
)
FIELDS = ("class_name", "domain", "words", "characteristic")
# What people write for a field and difflib would not find.
SYNONYMS = {
    "label": "class_name",
    "name": "class_name",
    "category": "class_name",
    "attribute": "characteristic",
    "feature": "characteristic",
}

_FIELD = re.compile(r"\{(" + "|".join(FIELDS) + r")\}")
_ONE_WORD = re.compile(r"\{([^\W\d][\w .-]{0,39})\}")


def characteristic_name(characteristic: BuiltIn | Template) -> str:
    return characteristic if isinstance(characteristic, str) else characteristic.name


def render(characteristic: BuiltIn | Template, *, class_name: str, domain: str, words: int) -> str:
    """The prompt. The four fields are filled in one pass, so that braces in a class name stay what they are; any other
    brace is plain text. `class_name` in its display form."""
    template = PROMPT if isinstance(characteristic, str) else characteristic.template
    values = {
        "class_name": class_name,
        "domain": domain,
        "words": str(words),
        "characteristic": characteristic_name(characteristic),
    }
    return _FIELD.sub(lambda field: values[field[1]], template)


def render_shorter(characteristic: BuiltIn | Template, *, class_name: str, domain: str, words: int) -> str:
    """The prompt of a caption that came out too long, asking for fewer words also where the template says nothing of
    its length."""
    prompt = render(characteristic, class_name=class_name, domain=domain, words=words)
    if isinstance(characteristic, str) or "{words}" in characteristic.template:
        return prompt
    return f"{prompt.rstrip()} Use at most {words} words."


def check_template(template: Template) -> None:
    """Raises InvalidInput for a field that is one of the four misspelt. What only looks like a field is plain text."""
    for found in _ONE_WORD.finditer(template.template):
        meant = None if found[1] in FIELDS else _meant(found[1])
        if meant is not None:
            raise InvalidInput(
                f"the template '{template.name}' holds {found[0]}, which is no field; did you mean {{{meant}}}? "
                f"The fields are {', '.join(f'{{{field}}}' for field in FIELDS)}",
                code="unknown_template_field",
                param="characteristics",
            )


def _meant(word: str) -> str | None:
    plain = re.sub(r"[ .-]+", "_", word.strip()).lower()
    close = get_close_matches(plain, FIELDS, n=1, cutoff=0.6)
    return close[0] if close else SYNONYMS.get(plain)
