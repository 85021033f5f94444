"""SparseLLM's losses are lines relative to the solution that its iterations begin with."""

import math

from pruning.figures import LineSeries
from pruning.weights.sparsellm_figures import loss_figures


def test_losses_are_relative_to_the_first() -> None:
    (figure,) = loss_figures([[2.0, 1.0, math.nan], [], [4.0, 5.0]])
    assert isinstance(figure, LineSeries)
    assert figure.series == {"block 0": [1.0, 0.5, None], "block 2": [1.0, 1.25]}


def test_blocks_without_iterations_have_no_plot() -> None:
    assert loss_figures([[], [2.0]]) == ()
