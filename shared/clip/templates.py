"""Class names as CLIP text. MMFT (arXiv 2601.21426): every caption is prefixed with "a photo of a {class}." for
training and for inference, and a class without captions falls back to that sentence alone."""

PHOTO = "a photo of a {}."


def display_name(class_name: str) -> str:
    """`Golden_Retriever` -> `golden retriever`: lower case, `_` and `-` as spaces, single spaces."""
    return " ".join(class_name.replace("_", " ").replace("-", " ").lower().split())


def photo_of(display: str) -> str:
    return PHOTO.format(display)


def prefixed(display: str, caption: str) -> str:
    return f"{photo_of(display)} {caption}"
