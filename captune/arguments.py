"""What several commands take in the same words. Each raises argparse.ArgumentTypeError, which says what is wrong."""

import argparse


def names(text: str) -> list[str]:
    """`a,b`; '' for none."""
    return [part.strip() for part in text.split(",") if part.strip()]


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is no number from 1")
    return int(text)


def integers(text: str) -> list[int]:
    """`0,1,2`"""
    return [_whole(part.strip()) for part in text.split(",")]


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"'{text}' is no whole number")
    return int(text)


def shots(text: str) -> int | None:
    """Images per class; None, for `all` or `full`, is every one."""
    if text in ("all", "full"):
        return None
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is neither a number of images per class nor 'all'")
    return int(text)


def shot_list(text: str) -> list[int | None]:
    """`1,4,all`"""
    return [shots(part.strip()) for part in text.split(",")]
