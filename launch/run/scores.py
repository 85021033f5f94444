"""Write the scores of a run beside its result, and read those of an earlier one.

Scores of the dense model do not depend on how much is removed. Read back, they prune the same model
to another size without a forward over the calibration text.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from calibration.digests import digest, stored_digest
from calibration.step_cache import ScoreCache, StepCache
from launch.run.inputs import Inputs
from launch.run.job import Job
from models.checkpoint.tensors import save_tensors
from models.errors import InputError
from models.untrusted import UserFile, user_path
from pruning.types import scores_key

DIRECTORY = "scores"  # below the output
FILE = "scores.safetensors"
# Facts of a run's fingerprint that the scores depend on.
STAMPED = (
    "model configuration",
    "weights",
    "--calibration tokens",
    "--calibration_batch",
    "--dtype",
    "--matmul",
)
METHOD = "--method"
REMEDY = "give the output of a run of the same model, calibration and method, or leave it out"


def stamp(job: Job, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return everything that the scores of a run depend on.

    Args:
      job: The run.
      facts: Its fingerprint.
    """
    return {name: facts[name] for name in STAMPED} | {METHOD: repr(scores_key(job.method))}


def score_cache(
    job: Job, inputs: Inputs, facts: Mapping[str, Any], cache: StepCache
) -> ScoreCache | None:
    """Return the cache through which a run takes or gives its scores.

    Args:
      job: The run.
      inputs: What it has read.
      facts: Its fingerprint.
      cache: Cache of its other steps.

    Returns:
      Cache; None for a method whose scores depend on the size.

    Raises:
      InputError: The scores that the run names are missing, damaged or of something else.
    """
    key = scores_key(job.method)
    if key is None:
        return None
    scores = None
    if job.config.scores:
        scores = read_scores(user_path(job.config.scores, "scores"), stamp(job, facts))
    # As `calibration.passes` has it: one key for a measurement and one for its tokens.
    return ScoreCache(cache, (key, digest(inputs.calibration.ids)), scores)


def digest_of(directory: str) -> str:
    """Return the SHA-256 of a run's scores, empty without any.

    Args:
      directory: Output of the run; empty for none.
    """
    return stored_digest(_path(user_path(directory, "scores"))) if directory else ""


def _path(output: pathlib.Path) -> pathlib.Path:
    return output / DIRECTORY / FILE


def write_scores(output: pathlib.Path, facts: Mapping[str, Any], scores: Any) -> None:
    """Write scores and their stamp.

    Args:
      output: Directory of the result.
      facts: `stamp` of the run.
      scores: Records of the blocks: dicts, lists, numbers, text, None and arrays.
    """
    arrays: dict[str, np.ndarray] = {}
    tree = _without_arrays(scores, "block", arrays)
    path = _path(output)
    path.parent.mkdir()
    # One fact, as the library writes several in any order.
    metadata = {"scores": json.dumps({"stamp": facts, "records": tree})}
    save_tensors(arrays, path, metadata)


def _without_arrays(value: Any, name: str, arrays: dict[str, np.ndarray]) -> Any:
    """Return a value with {"array": name} in place of its arrays, which go into `arrays`."""
    if isinstance(value, Mapping):
        return {"items": {k: _without_arrays(v, f"{name}.{k}", arrays) for k, v in value.items()}}
    if isinstance(value, list | tuple):
        return [_without_arrays(v, f"{name}.{i}", arrays) for i, v in enumerate(value)]
    if isinstance(value, np.ndarray | np.generic):
        arrays[name] = np.array(value, order="C")
        return {"array": name}
    return value


def _with_arrays(tree: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    """Return the value that `_without_arrays` took apart."""
    if isinstance(tree, list):
        return [_with_arrays(v, arrays) for v in tree]
    if not isinstance(tree, dict):
        return tree
    if "array" in tree:
        return arrays[tree["array"]]
    return {k: _with_arrays(v, arrays) for k, v in tree["items"].items()}


def read_scores(output: pathlib.Path, wanted: Mapping[str, Any]) -> Any:
    """Read the scores of an earlier run.

    Args:
      output: Directory of its result.
      wanted: `stamp` of the run that asks.

    Returns:
      Records of the blocks.

    Raises:
      InputError: There are none, they are damaged, or they are of something else.
    """
    path = _path(output)
    if not path.is_file():
        raise InputError(f"has no {DIRECTORY}/{FILE}", REMEDY, field="scores", value=output)
    file = UserFile(path, remedy=REMEDY)
    file.check()
    try:
        with safe_open(path, framework="numpy") as opened:
            content = json.loads((opened.metadata() or {})["scores"])
            arrays = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        found = dict(content["stamp"])
        records = _with_arrays(content["records"], arrays)
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, RecursionError) as e:
        raise file.error(f"is damaged ({type(e).__name__})") from None
    other = [name for name, value in wanted.items() if found.get(name) != value]
    if other:
        names = ", ".join(name.removeprefix("--") for name in other)
        raise InputError(f"has scores of another {names}", REMEDY, field="scores", value=output)
    return records
