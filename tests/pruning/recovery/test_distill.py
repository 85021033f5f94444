"""Distillation: zeros stay, the held-out loss never rises, any devices, killed at any time."""

import dataclasses
import json
import pathlib
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from calibration.runtime import Runtime
from models.arch import Model, logits
from models.checkpoint.output_format import ShapeChange
from models.errors import InputError
from models.programs import Program, Recorder, record_programs
from models.sharding import make_mesh
from pruning.recovery import adamw_core, distill_steps, distill_teacher
from pruning.recovery.distill import Distill
from pruning.recovery.distill_checkpoints import Checkpoints
from pruning.recovery.distill_data import batch_order, split_windows
from pruning.recovery.types import Recovered, RecoveryInputs
from pruning.recovery.zeros import masks_of
from reference import small
from reference.recovery import inputs_of, pruned_by, recover

QUICK = Distill(steps=6, lr=2e-3, batch=4, held_out=8)


def pair(
    directory: pathlib.Path,
    family: str = "llama",
    method: str = "wanda",
    sparsity: float = 0.5,
    dtype: str = "float32",
    **arguments: Any,
) -> RecoveryInputs:
    dense = small.model(family, dtype=dtype)
    pruned, kept = pruned_by(dense, method, sparsity, **arguments)
    return inputs_of(dense, pruned, kept)._replace(directory=directory)


def assert_kept(recovered: Model, pruned: Model) -> None:
    """Zeros at the same entries, other matrices changed, shapes and types as before."""
    old, new = (jax.tree.leaves((m.non_block, tuple(m.blocks))) for m in (pruned, recovered))
    for x, y in zip(new, old, strict=True):
        assert x.shape == y.shape and x.dtype == y.dtype
        if x.ndim == 2:
            assert np.array_equal(np.asarray(x) == 0, np.asarray(y) == 0)
    assert not small.same(tuple(recovered.blocks), tuple(pruned.blocks))


def held_out(result: Recovered) -> list[float]:
    return [point["held_out"] for point in result.details["curve"]]


def first_windows(settings: Distill, inputs: RecoveryInputs) -> jax.Array:
    """Windows of the first step."""
    ids = inputs.draw(settings.steps * settings.batch + settings.held_out)
    windows = split_windows(ids, settings.batch, settings.held_out, inputs.seed)
    order = batch_order(len(windows.train), settings.steps, inputs.seed)
    return jnp.asarray(windows.train[order[0]])


CASES = [
    ("llama", "wanda", 0.5, {}, {}),
    ("llama-gqa", "flap", 0.3, {}, {"top_k": 4, "temperature": 2.0}),
    ("opt", "sparsegpt", 0.5, {}, {"lora": 2, "lr": 1e-2}),
    ("llama", "sleb", 0.0, {"remove": (0,)}, {"accumulate": 2, "decay": 0.1}),
    ("mixtral", "wanda", 0.5, {}, {"lora": 2, "lr": 1e-2}),
    ("llama", "magnitude", 0.5, {"dtype": "bfloat16"}, {"lr": 5e-3}),
    ("llama", "magnitude", 0.5, {"dtype": "bfloat16"}, {"lora": 2, "lr": 1e-2, "top_k": 4}),
]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]}-{c[1]}")
def test_zeros_stay_and_the_held_out_loss_falls(case: Any, tmp_path: pathlib.Path) -> None:
    family, method, sparsity, arguments, settings = case
    inputs = pair(tmp_path, family, method, sparsity, **arguments)
    recovered, result = recover(dataclasses.replace(QUICK, **settings), inputs)
    assert_kept(recovered, inputs.pruned)
    losses = held_out(result)
    assert min(losses) < losses[0] and result.details["best"] > 0
    assert (result.non_block is None) == bool(settings.get("lora"))


@pytest.mark.slow
def test_masters_and_moments_of_zeros_stay_zero(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, states = pair(tmp_path), []
    step = distill_steps.step

    def noted(*arguments: Any) -> Any:
        states.append(step(*arguments))
        return states[-1]

    monkeypatch.setattr(distill_steps, "step", noted)
    recover(dataclasses.replace(QUICK, decay=0.1), inputs)
    before = jax.tree.leaves((inputs.pruned.non_block, tuple(inputs.pruned.blocks)))
    after, adam = states[-1][0]
    (moments,) = (part for part in jax.tree.leaves(adam, is_leaf=is_adam) if is_adam(part))
    for old, *new in zip(before, after, moments.mu, moments.nu, strict=True):
        zero = np.asarray(old) == 0
        assert all(not np.asarray(x)[zero].any() for x in new)
        assert all(np.asarray(x)[~zero].all() for x in new[:1])
    assert sum(int((np.asarray(x) == 0).sum()) for x in before) > 1000


def is_adam(node: Any) -> bool:
    return isinstance(node, optax.ScaleByAdamState)


@pytest.mark.slow
def test_a_model_that_gets_no_better_stays_as_it_was(tmp_path: pathlib.Path) -> None:
    inputs = pair(tmp_path)
    recovered, result = recover(dataclasses.replace(QUICK, lr=30.0), inputs)
    assert small.same(recovered[1:], (inputs.pruned.non_block, tuple(inputs.pruned.blocks)))
    assert result.details["best"] == 0 and "no better" in result.notes[0]
    assert result.details["steps"] == 5


@pytest.mark.slow
def test_a_step_is_that_of_optax_on_the_whole_models_gradient(tmp_path: pathlib.Path) -> None:
    """Written without any of the programs: one full logit array, no remat, no pieces."""
    inputs = pair(tmp_path, "llama-gqa")
    dense, pruned = inputs.dense, inputs.pruned
    settings = dataclasses.replace(QUICK, steps=1, lr=1e-3)
    recovered, result = recover(settings, inputs)
    assert result.details["best"] == 1
    windows = first_windows(settings, inputs)
    target = jax.nn.log_softmax(logits(dense, windows))

    def loss(params: Any) -> jax.Array:
        logs = jax.nn.log_softmax(logits(Model(pruned.arch, *params), windows))
        return jnp.mean(jnp.sum(jnp.exp(target) * (target - logs), axis=-1))

    params = (pruned.non_block, tuple(pruned.blocks))
    value, gradient = jax.value_and_grad(loss)(params)
    np.testing.assert_allclose(value, result.details["curve"][-1]["train"], rtol=1e-5)
    masks = masks_of(params)
    gradient = jax.tree.map(lambda g, m: jnp.where(m, g, 0.0), gradient, masks)
    tool = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(1e-3, *adamw_core.BETAS, weight_decay=0.0)
    )
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = tool.update(gradient, tool.init(params), params)
    want = optax.apply_updates(params, updates)
    for x, y, g in zip(
        jax.tree.leaves(recovered[1:]),
        jax.tree.leaves(want),
        jax.tree.leaves(gradient),
        strict=True,
    ):
        # The first step of Adam is the gradient's sign: entries without one may go either way.
        clear = np.abs(g) > 1e-6
        np.testing.assert_allclose(np.asarray(x)[clear], np.asarray(y)[clear], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_parts_of_a_batch_add_up_to_it(tmp_path: pathlib.Path) -> None:
    inputs = pair(tmp_path)
    settings = QUICK
    want = recover(settings, inputs)[1]
    got = recover(dataclasses.replace(settings, accumulate=4), inputs)[1]
    np.testing.assert_allclose(held_out(got), held_out(want), rtol=1e-5)


@pytest.mark.slow
def test_kept_tokens_of_the_whole_vocabulary_teach_as_the_teacher_does(
    tmp_path: pathlib.Path,
) -> None:
    inputs = pair(tmp_path)
    want = recover(QUICK, inputs)[1]
    got = recover(dataclasses.replace(QUICK, top_k=small.VOCAB), inputs)[1]
    np.testing.assert_allclose(held_out(got), held_out(want), rtol=1e-4)
    np.testing.assert_allclose(
        got.details["teacher_cross_entropy"], want.details["teacher_cross_entropy"], rtol=1e-6
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "settings"),
    [
        ("data=2,model=4", {"batch": 4, "accumulate": 2, "top_k": 5}),
        ("data=4,model=2", {"batch": 2, "lora": 4, "lr": 1e-2}),
    ],
)
def test_eight_devices_learn_as_one_does(
    mesh: str, settings: dict[str, Any], tmp_path: pathlib.Path
) -> None:
    recovery = dataclasses.replace(QUICK, **settings)
    inputs = pair(tmp_path / "one")
    want = recover(recovery, inputs)[1]
    runtime = Runtime(mesh=make_mesh(mesh))
    model, got = recover(recovery, inputs._replace(directory=tmp_path / "eight"), runtime)
    assert_kept(model, inputs.pruned)
    np.testing.assert_allclose(held_out(got), held_out(want), rtol=1e-4)


@pytest.mark.slow
def test_masters_moments_and_gradients_lie_on_all_devices(tmp_path: pathlib.Path) -> None:
    """The plan's bytes of one device, for a mesh of eight and for one device."""
    inputs = pair(tmp_path)
    peaks = []
    for mesh in (make_mesh("data=1"), make_mesh("data=4,model=2")):
        with record_programs(Recorder(mesh)) as recorder:
            Distill(steps=1, batch=8, held_out=8).run(
                inputs, Runtime(mesh=mesh), lambda j, block: None
            )
        step = next(c for c in recorder.costs if c.name == "distillation step")
        peaks.append(step.memory)
    assert peaks[1] < peaks[0] / 3


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"lora": 2, "top_k": 5}])
def test_a_training_that_was_stopped_goes_on_to_the_same_bytes(
    settings: dict[str, Any], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recovery = dataclasses.replace(QUICK, **settings)
    inputs = pair(tmp_path / "whole")
    want = recover(recovery, inputs)
    recovery = dataclasses.replace(recovery, checkpoint_minutes=0.0)
    inputs = inputs._replace(directory=tmp_path / "stopped")
    save = Checkpoints.save_if_due
    steps = []

    def stop(self: Checkpoints, point: Any) -> None:
        save(self, point)
        steps.append(point.record["step"])
        if len(steps) in (2, 4):
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoints, "save_if_due", stop)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            recover(recovery, inputs)
    got = recover(recovery, inputs)
    assert steps == [1, 2, 3, 4, 5, 6]
    assert small.same(got[0][1:], want[0][1:])
    assert got[1]._replace(non_block=None) == want[1]._replace(non_block=None)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_not_used(tmp_path: pathlib.Path) -> None:
    recovery = dataclasses.replace(QUICK, steps=2, checkpoint_minutes=0.0)
    inputs = pair(tmp_path)
    want = recover(recovery, inputs)
    name = json.loads((tmp_path / "training.json").read_text())["name"]
    file = max((tmp_path / name).rglob("*"), key=lambda p: p.stat().st_size * p.is_file())
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    got = recover(recovery, inputs)
    assert small.same(got[0][1:], want[0][1:])
    assert "damaged" in got[1].warnings[0] and not want[1].warnings


@pytest.mark.slow
def test_a_training_goes_on_where_the_disk_has_no_room_for_its_checkpoint(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recovery = dataclasses.replace(QUICK, steps=2, checkpoint_minutes=0.0)
    want = recover(recovery, pair(tmp_path / "room"))
    usage = type("Usage", (), {"free": 1000})
    disk = "pruning.recovery.distill_checkpoints.shutil.disk_usage"
    monkeypatch.setattr(disk, lambda directory: usage)
    got = recover(recovery, pair(tmp_path / "full"))
    assert small.same(got[0][1:], want[0][1:])
    assert "(2 left out)" in got[1].warnings[0] and not want[1].warnings
    assert not any((tmp_path / "full").glob("training*"))


@pytest.mark.slow
def test_kept_tokens_are_read_again_and_damaged_ones_made_again(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recovery = dataclasses.replace(QUICK, steps=2, top_k=3)
    inputs = pair(tmp_path)
    want = recover(recovery, inputs)
    made = []
    ask = distill_teacher.LiveTeacher.likeliest

    def likeliest(self: Any, *arguments: Any) -> Any:
        made.append(1)
        return ask(self, *arguments)

    monkeypatch.setattr(distill_teacher.LiveTeacher, "likeliest", likeliest)
    first = min(tmp_path.glob("teacher-*"))
    first.write_bytes(first.read_bytes()[:-40])
    got = recover(recovery, inputs)
    assert len(made) == 1 and small.same(got[0][1:], want[0][1:])


@pytest.mark.slow
def test_a_training_compiles_its_step_once(tmp_path: pathlib.Path) -> None:
    jax.clear_caches()
    traced = chex.assert_max_traces(distill_steps.step.function, n=1)
    step = Program(traced, "distillation step", distill_steps.step.static, (1,))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(distill_steps, "step", step)
        recover(QUICK, pair(tmp_path))


@pytest.mark.slow
def test_the_plan_of_a_distillation_has_the_calls_of_its_run(tmp_path: pathlib.Path) -> None:
    inputs = pair(tmp_path)
    mesh = make_mesh("data=1")
    counts = []
    for recorder in (Recorder(), Recorder(mesh)):
        with record_programs(recorder):
            dataclasses.replace(QUICK, top_k=3, lora=2).run(
                inputs, Runtime(mesh=mesh), lambda j, block: None
            )
        counts.append({cost.name: cost.calls for cost in recorder.costs})
    assert counts[0] == counts[1]


def test_what_cannot_be_distilled_is_refused() -> None:
    dense = small.model("llama")
    with pytest.raises(InputError, match="more than the 31 tokens"):
        Distill(top_k=32).check(dense, ShapeChange(), 16)
    wrongs: dict[str, Any] = {
        "steps": 0,
        "lr": 0.0,
        "batch": 0,
        "temperature": 0.0,
        "lora": -1,
        "top_k": -1,
    }
    wrongs |= {"accumulate": 3, "held_out": 0, "decay": -1.0, "checkpoint_minutes": -1.0}
    for name, value in wrongs.items():
        with pytest.raises(InputError, match=f"distill: {name}="):
            Distill(**{name: value})
