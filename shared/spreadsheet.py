"""Texts of users in CSV files: a spreadsheet must not run one as a formula (CWE-1236)."""

import re

# The wide signs, too: spreadsheets read them alike. Quotes before one are counted, so that `restored` is exact.
_FORMULA = re.compile("'*[=+\\-@\t\r\n\uff1d\uff0b\uff0d\uff20]")


def defused(text: str) -> str:
    """The text, behind a single quote where a spreadsheet would take it for a formula."""
    return f"'{text}" if _FORMULA.match(text) else text


def restored(text: str) -> str:
    """What `defused` was given. (Of a text that it never saw, at most one single quote before a formula is lost.)"""
    return text[1:] if text.startswith("'") and _FORMULA.match(text) else text
