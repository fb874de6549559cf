"""Do a classifier and a data set speak of the same classes?"""

from collections.abc import Sequence

from shared.errors import InvalidInput


def check_classes(own: Sequence[str], of_data: Sequence[str], instead: str) -> None:
    """Label c must mean the same class in both: the same names in the same order. Raises InvalidInput, which says what
    to do `instead`."""
    if list(own) == list(of_data):
        return
    where = next((i for i, pair in enumerate(zip(own, of_data, strict=False)) if pair[0] != pair[1]), None)
    if where is None:
        where = min(len(own), len(of_data))
    first, second = (f"'{names[where]}'" if where < len(names) else "missing" for names in (own, of_data))
    raise InvalidInput(
        f"the classifier has {len(own)} classes and the data set {len(of_data)}, which must be the same in the same "
        f"order; the first difference is at class {where + 1}: {first} and {second}. {instead}",
        code="class_lists_differ",
        param="dataset_id",
    )
