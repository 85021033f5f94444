"""Parse and check numbers of flags, and lists of them."""

from collections.abc import Callable, Sequence
from typing import Any

from launch.flags import calls
from models.errors import InputError


def check_sparsity(sparsity: float, field: str = "sparsity") -> None:
    """Check that a sparsity is at least 0 and below 1.

    Args:
      sparsity: Fraction to remove.
      field: Name of the setting, for errors.

    Raises:
      InputError: It is not.
    """
    if not 0 <= sparsity < 1:  # also refuses NaN
        remedy = "give the fraction to remove, such as 0.3"
        if 1 < sparsity < 100:  # a percentage
            remedy = f"did you mean {sparsity / 100:g}? {remedy}"
        raise InputError(
            "must be at least 0 and less than 1", remedy, field=field, value=f"{sparsity:g}"
        )


def numbers(
    field: str, text: str, kind: Callable[[str], Any], allowed: Callable[[Any], bool], wanted: str
) -> tuple[Any, ...]:
    """Parse a comma-separated list of numbers.

    Args:
      field: Name of the setting, for errors.
      text: The list.
      kind: Converts an item, such as `int`.
      allowed: Returns True for values that are allowed.
      wanted: Description of the allowed values, for errors.

    Raises:
      InputError: The list is empty, or an item is not allowed.
    """
    try:
        values = tuple(kind(item) for item in calls.split_list(text))
    except ValueError:
        values = ()
    if not values or not all(map(allowed, values)):
        raise InputError(f"must be {wanted}, separated by commas", field=field, value=text)
    return values


def seeds(text: str) -> tuple[int, ...]:
    """Parse --seeds.

    Args:
      text: The flag's value.

    Raises:
      InputError: The value is no list of integers of at least 0.
    """
    return numbers("seeds", text, int, lambda v: 0 <= v < 2**31, "integers from 0 on")


def check_once(field: str, items: Sequence[Any]) -> None:
    """Check that no item of a list stands in it twice.

    Args:
      field: Name of the setting, for errors.
      items: The list.

    Raises:
      InputError: An item stands in it twice.
    """
    if len(set(items)) < len(items):
        raise InputError(
            "has an item twice", "give each once", field=field, value=",".join(map(str, items))
        )
