"""Mean and standard deviation over seeds."""

import pytest

from launch.report.seeds import spread


def test_one_seed_has_no_deviation() -> None:
    assert spread([0.25]) == (0.25, 0.0)


def test_the_deviation_is_that_of_a_sample() -> None:
    assert spread([1.0, 3.0]) == pytest.approx((2.0, 2**0.5))
