"""Format strings and templates: in prompts, class names, and the chat templates that come with a model."""

from pathlib import Path
from typing import Any

import pytest
from jinja2.exceptions import SecurityError, UndefinedError
from transformers.utils.chat_template_utils import render_jinja_template

from services.captioner.prompts import check_template, render, render_shorter
from shared.clip.templates import display_name
from shared.errors import CaptuneError
from shared.schemas.captions import Template

HOSTILE = [
    "{__class__}",
    "{0.__init__.__globals__}",
    "{class_name.__class__.__mro__}",
    "{class_name!r}",
    "{class_name:>1000000000}",
    "{{class_name}}",
    "{words:{words}}",
    "%s%s%s%n",
    "%(class_name)s",
    "${class_name}",
    "$class_name",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{% for x in range(10**9) %}a{% endfor %}",
    "#{7*7}",
    "<%= 7*7 %>",
    "\\1\\g<0>",
    "{" * 500,
]


@pytest.mark.parametrize("hostile", HOSTILE)
def test_only_the_four_fields_are_filled_in(hostile: str) -> None:
    values = {"class_name": "cat", "domain": "pets", "words": 50}
    try:
        check_template(Template(name="mine", template=f"{hostile} of {{class_name}}"))
    except CaptuneError:
        return  # misspelt fields are refused, which is safe too
    for made in (render, render_shorter):
        prompt = made(Template(name="mine", template=f"{hostile} of {{class_name}}"), **values)  # type: ignore[arg-type]
        expected = hostile.replace("{class_name}", "cat").replace("{words}", "50")
        assert prompt.startswith(f"{expected} of cat")


@pytest.mark.parametrize("hostile", HOSTILE)
def test_a_class_name_is_not_filled_in_again(hostile: str) -> None:
    prompt = render("visual", class_name=hostile, domain=hostile, words=50)
    assert prompt.count(hostile) == 2
    assert "{domain}" in render("visual", class_name="{domain}", domain="pets", words=50)


@pytest.mark.parametrize("hostile", HOSTILE)
def test_a_prefix_of_training_takes_a_class_name_as_it_is(hostile: str) -> None:
    assert display_name(hostile)  # never an error, and no format is applied to it


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__init__.__globals__ }}",
        "{{ self.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ messages.append(1) }}",
        "{{ lipsum.__globals__['os'] }}",
        "{{ ''|attr('__class__')|attr('__mro__') }}",
    ],
)
def test_a_models_chat_template_runs_in_a_sandbox(template: str) -> None:
    """It comes with the model's files; transformers renders it, as the engine `hf` does by `apply_chat_template`."""
    messages: Any = [[{"role": "user", "content": "hello"}]]
    try:
        rendered = str(render_jinja_template(messages, chat_template=template)[0])
    except (SecurityError, UndefinedError):
        return
    assert not any(sign in rendered for sign in ("<class", "<module", "<function", "uid="))


def test_no_source_formats_with_a_users_text() -> None:
    """`str.format`, `%` and templates apply to constants only: a text of a user's is always an argument."""
    root = Path(__file__).resolve().parents[2]
    found = {
        str(path.relative_to(root))
        for folder in ("services", "shared")
        for path in (root / folder).rglob("*.py")
        if any(word in path.read_text() for word in (".format(", ".format_map(", "string.Template", "jinja2"))
    }
    assert found == KNOWN.keys()


KNOWN = {
    "services/embedded/backup.py": "names of our own tables",
    "services/evaluator/board/leaderboard_query.py": "parts of SQL, each a constant; values are bound",
    "shared/web/api_document.py": "names of schemas",
    "shared/clip/templates.py": "the prompt 'a photo of a {}.', and a class name as its argument",
}
