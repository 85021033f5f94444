r"""Train what is left of a pruned model towards its dense model; zeros and shapes stay.

python -m launch.recover --model=PRUNED --teacher=DIR --recover='blocks(steps=48)' \
  --calibration=c4 --eval_data=wikitext2,c4 --output=OUT
"""

import dataclasses
import datetime
import functools
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from rich.console import Console

from calibration.journal import Journal
from calibration.runtime import Runtime
from eval.size import peak_memory
from launch.flags import quoting
from launch.flags.cli import Flags, frozen, run
from launch.flags.common import (
    calibration_flags,
    evaluation_flags,
    model_flags,
    output_path,
    recover_flag,
)
from launch.flags.dtypes import stored_dtype
from launch.flags.outputs import output_flags
from launch.flags.recoveries import Call, parse_recover
from launch.report import console, removal
from launch.report.files import write_reports
from launch.report.progress import prefixed, progress
from launch.run import export, recovery
from launch.run.card import write_card
from launch.run.compilation import counted
from launch.run.describe import checks_of, measures_of
from launch.run.job import Output
from launch.run.measure import Clock, protocol, tokenizer_of
from launch.run.optional import optional
from launch.run.places import check_free, check_space
from launch.run.processes import process_flags, start
from launch.run.recover_inputs import Inputs, RecoverConfig, fingerprint, read_inputs
from launch.run.resume import JOURNAL, Attempt
from launch.run.samples import Samples, samples, with_greedy
from launch.run.staging import Stage, staged
from launch.run.tasks import task_flags
from models.errors import InputError
from models.processes import check_agreement, is_primary, run_on_primary
from models.progress import Progress


def options() -> Flags:
    """Define the flags of `launch.recover`."""
    f = Flags("launch.recover", __doc__ or "")
    model_flags(f, writes=True)
    f.string(
        "teacher",
        None,
        "the dense model that --model was pruned from: a directory, hub id or .gguf file",
        files=True,
    )
    f.string("output", None, "directory to write the recovered model and its report to")
    output_flags(f)
    f.boolean("resume", True, "continue an interrupted run behind its last finished block")
    f.group("Recovery")
    recover_flag(f, "blocks")
    calibration_flags(f, draws=False)
    f.integer("seed", 0, "seed of the calibration windows and of the recovery")
    evaluation_flags(f)
    task_flags(f)
    process_flags(f)
    return f


class _NoBlocks:
    """The sink of the measurements' journal: each recovery has a journal and a sink of its own."""

    blocks = 0
    files = ()

    def mark(self) -> None:
        """Return that there is nothing to mark."""

    def rewind(self, mark: None) -> None:
        """Do nothing.

        Args:
          mark: Without effect.
        """


def recover(config: RecoverConfig) -> dict[str, Any]:
    """Recover a pruned model: measure, train, write, load back, measure again.

    Args:
      config: Settings of the run.

    Returns:
      The report, as it stands in the output directory.

    Raises:
      InputError: A setting or an input is wrong; the output is not touched.
    """
    clock = Clock("load", "recover", "eval", "export")
    chain = parse_recover(config.recover)
    if not chain:
        raise InputError("names no recovery", "give blocks", field="recover", value=config.recover)
    output = output_path(config.output)
    run_on_primary(lambda: check_free(output, export.REPORT))
    inputs = read_inputs(config, chain)
    attempt = Attempt()
    with (
        progress() as shown,
        counted() as compilation,
        staged(output, export.REPORT, config.resume, attempt.keeps) as stage,
    ):
        run_on_primary(lambda: _check_space(stage, config, chain, inputs))
        result = _recover_into(stage, config, chain, inputs, attempt, clock, shown)
        before = inputs.finished.report["seconds"].get("calibrate_and_prune", 0.0)
        result["seconds"] = {"calibrate_and_prune": before, **clock.seconds}
        result["compilation"] = compilation.record()
        result["warnings"] += run_on_primary(lambda: write_reports(stage.result, result))
        run_on_primary(lambda: write_card(stage.result, result, inputs.dense.directory))
    return result


def _recover_into(
    stage: Stage,
    config: RecoverConfig,
    chain: Sequence[Call],
    inputs: Inputs,
    attempt: Attempt,
    clock: Clock,
    shown: Progress,
) -> dict[str, Any]:
    """Write the recovered model into a staged directory; return the report without its seconds."""
    check_agreement(facts := fingerprint(config, inputs))
    journal = Journal(stage.work / JOURNAL, facts, _NoBlocks())
    attempt.journal = journal
    clock.record("load")
    measure, pruned = inputs.comparisons, inputs.pruned
    dense = journal.step(lambda: measure.dense(prefixed(shown, "dense model: ")))
    before = journal.step(lambda: measure.pruned(pruned, prefixed(shown, "pruned model: ")))
    clock.record("eval")
    windows, teacher = inputs.calibration.ids, inputs.dense
    runtime = Runtime(batch=config.calibration_batch, mesh=inputs.mesh, progress=shown)
    origin = (inputs.source, config.calibration_length, config.seed)
    form = (config.layout, config.output_format, config.gguf_type, config.pack)
    task = recovery.Task(
        chain,
        teacher,
        inputs.finished.kept_blocks,
        windows,
        recovery.drawer(*origin, teacher, tokenizer_of(teacher), inputs.mesh),
        config.seed,
        recovery.with_room(runtime, config.activations, teacher.model, windows),
        facts,
        stage.work,
        Output(config.output, *form, config.check, config.resume),
        stored_dtype(config.dtype, pruned),
    )
    done = recovery.recover_all(task, pruned, stage.result)
    clock.record("recover")
    loaded = done.written.loaded
    after = measure.pruned(loaded, prefixed(shown, "recovered model: "))
    result = report_of(config, inputs, done, measures_of(dense, before, after))
    result["warnings"] += [f"unfinished run: {sentence}" for sentence in journal.damage]
    others = (tokenizer_of(teacher), measure.data, shown, loaded)
    texts = functools.partial(samples, teacher, pruned, *others)
    nothing = Samples([], {})
    (result["samples"], greedy), missed = run_on_primary(
        lambda: optional("no sample texts", texts, nothing)
    )
    result["agreement"] = with_greedy(result["agreement"], greedy)
    result["warnings"] += missed
    clock.record("eval")
    return result


def _check_space(
    stage: Stage, config: RecoverConfig, chain: Sequence[Call], inputs: Inputs
) -> None:
    """Check that the disk has room for the result."""
    needed = recovery.least_bytes(chain, inputs.pruned, config.dtype, config.output_format)
    begun = [path for folder in stage for path in folder.rglob("*") if path.is_file()]
    check_space(stage.result, needed, begun)


def report_of(
    config: RecoverConfig, inputs: Inputs, done: recovery.Result, measures: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the report: that of the pruning, with the recovery and with new measurements.

    Args:
      config: Settings of the run.
      inputs: What it has read.
      done: The recovery.
      measures: `perplexity`, `agreement` and `tasks`.
    """
    report = inputs.finished.report
    earlier = report.get("recovery", {}).get("stages", [])
    settings = dataclasses.asdict(config)
    command = quoting.join(["python", "-m", "launch.recover", *options().given(settings)])
    old, loaded = report["protocol"], done.written.loaded
    data, zero_shot = inputs.comparisons.data, inputs.comparisons.zero_shot
    chain = "+".join(stage["recover"] for stage in [*earlier, *done.records])
    return {
        **report,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "settings": {**report["settings"], "output": config.output, "recover": chain},
        "command": command,
        "protocol": {
            **old,
            "recovery": inputs.calibration.protocol,
            **protocol(data, zero_shot),
        },
        "parameters": {**report["parameters"], "pruned": done.parameters},
        "bytes": {**report["bytes"], "pruned": loaded.stored_bytes},
        "dtype": {**report["dtype"], "stored": loaded.config["dtype"]},
        **measures,
        "peak_memory_bytes": peak_memory(jax.local_devices()),
        "warnings": [
            *removal.without_logits_warnings(report["warnings"]),
            *removal.logits_warnings(done.written),
            *done.warnings,
            *inputs.calibration.warnings,
        ],
        "notes": [*report.get("notes", ()), *done.notes],
        **checks_of(done.written),
        "figures": [*report.get("figures", ()), *done.figures],
        "recovery": {
            "stages": [*earlier, *done.records],
            "zeros": done.zeros,
            "settings": settings,
        },
    }


def main(values: dict[str, Any]) -> None:
    """Recover the model and print the closing table.

    Args:
      values: Values of the flags.
    """
    start(values)
    result = recover(frozen(RecoverConfig, values))
    if is_primary():
        console.show(result, Console())


if __name__ == "__main__":
    sys.exit(run(options(), main))
