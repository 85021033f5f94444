"""Settings are resolved into one job, or refused."""

import pytest

from launch import prune
from launch.flags.cli import frozen
from launch.run.job import Job, RunConfig, resolve
from models.errors import InputError


def job(*flags: str) -> Job:
    return resolve(frozen(RunConfig, prune.options().parse(["--mesh=data=1", *flags])))


def test_a_pattern_sets_the_sparsity() -> None:
    request = job("--method=wanda", "--pattern=1:4").request
    assert request.pattern == (1, 4) and request.sparsity == 0.25


def test_a_pattern_agrees_with_its_own_sparsity() -> None:
    assert job("--method=wanda", "--pattern=2:4", "--sparsity=0.5").request.sparsity == 0.5


@pytest.mark.parametrize(
    ("flags", "other"),
    [
        (["--sparsity=0.3"], "`sparsity`=0.3"),
        (["--method=wanda", "--pattern=2:4"], "`pattern`=2:4"),
        (["--method=sleb(blocks=2)"], "`method`=sleb(blocks=2)"),
        (["--method=sleb(remove=[3])"], "`method`=sleb(remove=[3])"),
    ],
)
def test_a_target_alone_says_how_much_to_remove(flags: list[str], other: str) -> None:
    with pytest.raises(InputError) as error:
        job("--target=params=100M", *flags)
    assert error.value.field == "target" and error.value.reason.startswith(f"contradicts {other},")


def test_the_sparsity_of_a_target_is_found_later() -> None:
    resolved = job("--target=memory=1GiB@8x64")
    assert resolved.target and resolved.target.batch == 8 and resolved.request.sparsity == 0.0


def test_a_method_that_sets_the_sparsity_needs_none() -> None:
    resolved = job("--method=sleb(blocks=2)")
    assert resolved.method.sets_sparsity and resolved.request.sparsity == 0.0


def test_a_uniform_allocation_is_none() -> None:
    assert job("--sparsity=0.5").request.allocation is None
    assert job("--method=wanda", "--sparsity=0.5", "--allocation=owl").request.allocation


def test_each_draw_has_the_next_seed() -> None:
    resolved = job("--sparsity=0.5", "--seed=3", "--calibration_draws=3")
    assert resolved.sources.calibration.seeds == (3, 4, 5) and resolved.request.seed == 3


def test_a_job_has_the_places_of_its_inputs_and_output() -> None:
    resolved = job("--sparsity=0.5", "--model=m", "--output=o", "--noresume", "--eval_windows=7")
    assert resolved.sources.model == "m" and resolved.sources.evaluation.windows == 7
    assert resolved.output.directory == "o" and not resolved.output.resume
    assert resolved.runtime.batch == 8 and resolved.runtime.journal is None


@pytest.mark.parametrize("flags", [[], ["--sparsity=1"], ["--sparsity=nan"], ["--sparsity=-0.1"]])
def test_a_sparsity_that_is_missing_or_out_of_range_is_refused(flags: list[str]) -> None:
    with pytest.raises(InputError) as error:
        job("--method=wanda", *flags)
    assert error.value.field == "sparsity" and error.value.remedy


@pytest.mark.parametrize(
    ("model", "given", "name", "reason"),
    [
        ("embedded:tiny-llama", "", "embedded", "the default for an embedded model"),
        ("owner/name", "", "wikitext2", "the default for a model that is not embedded"),
        ("a/directory", "", "wikitext2", "the default for a model that is not embedded"),
        ("owner/name", "embedded", "embedded", ""),
        ("embedded:tiny-opt", "ptb", "ptb", ""),
    ],
)
def test_the_calibration_text_follows_the_model_where_none_is_named(
    model: str, given: str, name: str, reason: str
) -> None:
    flags = (f"--model={model}", f"--calibration={given}")
    source = job("--sparsity=0.5", *flags).sources.calibration
    assert (source.name, source.reason) == (name, reason)


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        (("--method=magnitude",), "embedded"),
        (("--method=magnitude(scope='row')", "--allocation=alpha(epsilon=0.2)"), "embedded"),
        (("--method=magnitude", "--allocation=owl"), "wikitext2"),
        (("--method=magnitude", "--refine=dsnot"), "wikitext2"),
        (("--method=magnitude_sp",), "embedded"),
        (("--method=magnitude_sp(repair='bias')",), "wikitext2"),
        (("--method=wanda", "--allocation=alpha"), "wikitext2"),
    ],
)
def test_masks_that_follow_from_the_weights_need_no_text_of_the_hub(
    flags: tuple[str, ...], name: str
) -> None:
    values = ["--model=a/directory", "--sparsity=0.5", *flags]
    assert job(*values).sources.calibration.name == name
