"""Templates are filled in one pass and nothing else in them is touched."""

import re
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.captioner.prompts import FIELDS, PROMPT, characteristic_name, check_template, render, render_shorter
from shared.errors import InvalidInput
from shared.schemas.captions import Template

letters = st.sampled_from("{}{}{}abc_ .:!0123\n") | st.characters(codec="utf-8")
anything = st.text(alphabet=letters, min_size=1, max_size=60)
pieces = st.lists(st.sampled_from([f"{{{field}}}" for field in FIELDS]) | anything, min_size=1).map("".join)


def of(text: str) -> Template:
    return Template(name="mine", template=text)


def filled(text: str, class_name: str = "tabby cat", domain: str = "pets", words: int = 30) -> str:
    return render(of(text), class_name=class_name, domain=domain, words=words)


@given(pieces.filter(lambda text: len(text) <= 2000))
def test_only_the_four_fields_are_replaced_whatever_the_braces(text: str) -> None:
    values = {"class_name": "tabby cat", "domain": "pets", "words": "30", "characteristic": "mine"}
    parts = re.split(r"(\{(?:class_name|domain|words|characteristic)\})", text)
    expected = "".join(values[part[1:-1]] if i % 2 else part for i, part in enumerate(parts))
    assert filled(text) == expected


@given(anything, anything)
def test_braces_in_a_value_are_not_expanded_again(class_name: str, domain: str) -> None:
    assert filled("{class_name}|{domain}", class_name, domain) == f"{class_name}|{domain}"
    assert filled("{class_name}", "{domain}") == "{domain}"


def test_the_built_in_prompt_is_the_papers() -> None:
    prompt = render("petals", class_name="sword lily", domain="flower", words=50)
    assert prompt == (
        "To differentiate this sword lily photo from other flower photos, describe its primary petals characteristics "
        "based on the photo in 50 words."
    )
    assert set(re.findall(r"{(\w+)}", PROMPT)) == set(FIELDS)
    assert characteristic_name("petals") == "petals"
    assert characteristic_name(of("x")) == "mine"


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("{class}", "class_name"),
        ("{classname}", "class_name"),
        ("{Class_Name}", "class_name"),
        ("{class name}", "class_name"),
        ("{label}", "class_name"),
        ("{word}", "words"),
        ("{num_words}", "words"),
        ("{domains}", "domain"),
        ("{characteristics}", "characteristic"),
    ],
)
def test_a_misspelt_field_is_refused_with_the_one_that_was_meant(text: str, meant: str) -> None:
    with pytest.raises(InvalidInput, match=f"did you mean {{{meant}}}") as error:
        check_template(of(f"Describe the {{domain}} {text}."))
    assert (error.value.code, error.value.param) == ("unknown_template_field", "characteristics")
    assert text in error.value.message


@pytest.mark.parametrize(
    "text",
    ["{class_name} {domain} {words} {characteristic}", '{"a": 1}', "{}", "{{class_name}}", "{ x", "{0}", "{zzz}"],
)
def test_other_braces_are_plain_text(text: str) -> None:
    check_template(of(text))


@given(anything)
def test_the_check_survives_any_template(text: str) -> None:
    with suppress(InvalidInput):
        check_template(of(text))


def test_a_shorter_caption_is_asked_for_also_where_the_template_names_no_length() -> None:
    silent, says = of("Describe the {class_name}."), of("The {class_name} in {words} words.")
    assert render_shorter(silent, class_name="cat", domain="pets", words=12) == (
        "Describe the cat. Use at most 12 words."
    )
    assert render_shorter(says, class_name="cat", domain="pets", words=12) == "The cat in 12 words."
    assert "in 12 words" in render_shorter("shape", class_name="cat", domain="pets", words=12)
