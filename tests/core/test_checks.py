"""Field checks: what passes, and a sentence that names the field, its value and what is allowed."""

import math
import re
from collections.abc import Callable
from typing import Any

import pytest

from agentsd import checks
from agentsd.config import StepCache


@pytest.mark.parametrize(
    ("check", "good", "bad", "allowed"),
    [
        (lambda x: checks.number("x", x, 0, 1), [0, 1, 0.5], [True, "1", math.nan, -0.1, None], "a number from 0 to 1"),
        (lambda x: checks.number("x", x, 2), [2, 1e9], [math.inf, math.nan, 1.9], "a number of at least 2"),
        (lambda x: checks.number("x", x, 0, 1, optional=True), [None, 0.5], [2], "null or a number from 0 to 1"),
        (lambda x: checks.whole("x", x, 1), [1, 2**70], [0, 1.0, True, "1", None], "a whole number from 1"),
        (lambda x: checks.whole("x", x, 0, 3), [0, 3], [4, -1], "a whole number from 0 to 3"),
        (lambda x: checks.whole("x", x, 1, optional=True), [None, 1], [0], "null or a whole number from 1"),
        (lambda x: checks.choice("x", x, ("a", "b")), ["a"], ["c", None, ["a"]], "one of a, b"),
        (lambda x: checks.flag("x", x), [True, False], [0, "true", None], "true or false"),
        (lambda x: checks.text("x", x), ["", "a"], [1, None], "text"),
        (lambda x: checks.names("x", x), [[], ["a", "b"]], ["ab", [1], None], "a list of names"),
        (lambda x: checks.names("x", x, ("a", "b")), [["b", "a"]], [["c"]], "one of a, b"),
    ],
)
def test_a_value_passes_or_is_refused_by_name(
    check: Callable[[Any], object], good: list[Any], bad: list[Any], allowed: str
) -> None:
    for value in good:
        check(value)
    for value in bad:
        with pytest.raises(ValueError, match=rf"x is .+; it must be {re.escape(allowed)}$"):
            check(value)


def test_names_are_kept_once_in_their_order() -> None:
    assert checks.names("x", ["b", "a", "b"]) == ("b", "a")


def test_unknown_fields_are_named_with_those_there_are() -> None:
    checks.known_fields("an entry", {"interval": 2}, StepCache)
    with pytest.raises(ValueError, match="an entry has no field 'intervall'; its fields are until, interval, layers"):
        checks.known_fields("an entry", {"intervall": 2}, StepCache)
    with pytest.raises(ValueError, match="x has no field 'c'; its fields are a, b"):
        checks.known_fields("x", ["a", "c"], ("a", "b"))
