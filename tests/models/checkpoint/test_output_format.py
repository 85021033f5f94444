"""A pruned model is written in the plainest form that holds it, with equal logits in every one."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import arch
from models.arch import Model, apply_block, embed, logits
from models.checkpoint.output_format import (
    Form,
    Layout,
    Shape,
    ShapeChange,
    choose_form,
    preview,
)
from models.checkpoint.reader import open_checkpoint
from models.checkpoint.spelling import with_dtype
from models.errors import InputError
from models.families import hf
from models.generate import generate
from models.surgery import cut
from reference import tiny, torch_models

BOTH = ("heads", "neurons")
# Six heads of 8 in a hidden size of 48: three divide it, five do not.
WIDE = {"hidden_size": 48, "num_attention_heads": 6, "head_dim": 8}
LLAMA, GQA = {**tiny.LLAMA, **WIDE}, {**tiny.LLAMA, **WIDE, "num_key_value_heads": 3}
QWEN2, MISTRAL = (
    {**tiny.QWEN2, **WIDE, "num_key_value_heads": 3},
    {**tiny.MISTRAL, **WIDE, "num_key_value_heads": 3},
)
SLIDING = {**QWEN2, "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}
OPT = {**tiny.OPT, "hidden_size": 48, "num_attention_heads": 6}
UNBIASED_OPT = {**OPT, "enable_bias": False}


def pruned(
    config: Mapping[str, Any], heads: list[int], neurons: list[int], biases: tuple[str, ...] = ()
) -> Model:
    """Return a random model with given units left in each block and random biases."""
    model = tiny.random_model(config)
    rng, blocks = np.random.default_rng(1), []
    for block, counts in zip(model.blocks, zip(heads, neurons, strict=True), strict=True):
        for name, count in zip(BOTH, counts, strict=True):
            units = {"heads": len(block.k.w) // model.arch.config.head_dim, "neurons": 40}[name]
            block = cut(
                block,
                model.arch.group(name),
                np.isin(np.arange(units), rng.permutation(units)[:count]),
            )
        for name in biases:
            p = getattr(block, name)
            block = block.replace(
                **{name: p.replace(b=jnp.asarray(rng.normal(size=len(p.w)), jnp.float32))}
            )
        blocks.append(block)
    return model._replace(blocks=tuple(blocks))


def write(
    directory: pathlib.Path, model: Model, config: Mapping[str, Any], layout: Layout = "auto"
) -> Form:
    return tiny.written(directory, model, config, layout=layout)[1]


Case = tuple[Mapping[str, Any], list[int], list[int], tuple[str, ...], str]
CASES: dict[str, Case] = {
    "neurons": (GQA, [3, 3], [20, 20], (), "stock llama"),
    "heads that divide": (LLAMA, [3, 3], [20, 20], (), "stock llama"),
    "heads that do not": (LLAMA, [5, 5], [20, 20], (), "stock mistral"),
    "groups that do not": (GQA, [2, 2], [40, 40], (), "stock llama"),
    "with biases": (LLAMA, [3, 3], [20, 20], ("o", "down"), "stock llama"),
    "heads that do not, with biases": (LLAMA, [5, 5], [20, 20], ("o", "down"), "stock granite"),
    "biases of some linears": (GQA, [3, 3], [40, 40], ("down",), "stock llama"),
    "differ": (GQA, [2, 3], [20, 21], (), "topiary_llama"),
    "differ, with biases": (GQA, [1, 3], [40, 21], ("o", "down"), "topiary_llama"),
    "qwen2 neurons": (QWEN2, [3, 3], [20, 20], (), "stock qwen2"),
    "qwen2 with biases": (QWEN2, [3, 3], [20, 20], ("o",), "stock llama"),
    "qwen2 heads": (QWEN2, [1, 1], [20, 20], (), "stock llama"),
    "qwen2 differs": (QWEN2, [1, 2], [20, 20], ("o", "down"), "topiary_qwen2"),
    "sliding": (SLIDING, [2, 2], [20, 20], (), "stock qwen2"),
    "sliding with biases": (SLIDING, [3, 3], [20, 20], ("o", "down"), "topiary_qwen2"),
    "mistral": (MISTRAL, [1, 1], [20, 20], (), "stock mistral"),
    "mistral with biases": (MISTRAL, [3, 3], [20, 20], ("o", "down"), "topiary_mistral"),
    "opt neurons": (OPT, [6, 6], [20, 20], (), "stock opt"),
    "opt with biases": (UNBIASED_OPT, [6, 6], [20, 20], ("o", "fc2"), "stock opt"),
    "opt heads": (OPT, [5, 5], [20, 20], (), "topiary_opt"),
    "opt differs, with biases": (UNBIASED_OPT, [4, 6], [20, 30], ("o", "fc2"), "topiary_opt"),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_every_form_is_the_same_function(case: Case, tmp_path: pathlib.Path) -> None:
    """Our loader reads the same bits where nothing is padded; logits are equal in both loaders."""
    config, heads, neurons, biases, label = case
    model = pruned(config, heads, neurons, biases)
    found = write(tmp_path / "out", model, config)
    assert found.label.split(",")[0] == label and (found.code is None) == label.startswith("stock")
    checkpoint, tokens = open_checkpoint(tmp_path / "out"), tiny.tokens()
    np.testing.assert_allclose(logits(checkpoint.model, tokens), logits(model, tokens), atol=1e-5)
    for ours, theirs in zip(model.blocks, checkpoint.model.blocks, strict=True):
        assert [x.w.shape for x in (ours.q, ours.k, ours.o)] == [
            x.w.shape for x in (theirs.q, theirs.k, theirs.o)
        ]
    assert torch_agrees(tmp_path / "out", model)


def torch_agrees(directory: pathlib.Path, model: Model) -> bool:
    """Assert that transformers has our logits on the tests' tokens and writes the same 32 after."""
    pytest.importorskip("torch")
    theirs, tokens = torch_models.load(directory), tiny.tokens()
    np.testing.assert_allclose(
        np.asarray(logits(model, tokens)), torch_models.logits(theirs, tokens), atol=1e-4, rtol=1e-4
    )
    np.testing.assert_array_equal(
        generate(open_checkpoint(directory).model, tokens, 32),
        torch_models.greedy(theirs, tokens, 32),
    )
    return True


PADDED: dict[str, Case] = {
    "llama": (LLAMA, [2, 5], [20, 21], (), "stock mistral"),
    "gqa": (GQA, [1, 3], [20, 21], ("o", "down"), "stock llama"),
    "opt": (OPT, [2, 5], [20, 21], (), "stock opt"),
    "sliding": (SLIDING, [1, 2], [20, 21], (), "stock qwen2"),
}


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=name, marks=() if name == "llama" else pytest.mark.slow)
        for name, case in PADDED.items()
    ],
)
def test_padding_makes_a_stock_model(case: Case, tmp_path: pathlib.Path) -> None:
    config, heads, neurons, biases, label = case
    model = pruned(config, heads, neurons, biases)
    assert write(tmp_path / "out", model, config, "padded").label == label
    checkpoint = open_checkpoint(tmp_path / "out")
    assert checkpoint.config[hf.family(config).neurons] == 21
    np.testing.assert_allclose(
        logits(checkpoint.model, tiny.tokens()), logits(model, tiny.tokens()), atol=1e-5
    )
    assert torch_agrees(tmp_path / "out", model)


def test_programs_compiled_for_a_model_serve_the_one_pruned_from_it(tmp_path: pathlib.Path) -> None:
    """Blocks that kept their shapes, though the configuration is another."""
    model = pruned(GQA, [3, 2], [40, 21])
    x = embed(model.arch, model.non_block, tiny.tokens())
    apply_block(model.arch, model.blocks[0], x)
    compiled = arch._apply.jitted._cache_size(), arch._embed.jitted._cache_size()
    write(tmp_path / "out", model, GQA)
    again = open_checkpoint(tmp_path / "out").model
    assert again.arch is not model.arch
    apply_block(again.arch, again.blocks[0], embed(again.arch, again.non_block, tiny.tokens()))
    assert (arch._apply.jitted._cache_size(), arch._embed.jitted._cache_size()) == compiled


@pytest.mark.parametrize("second", ["auto", "padded"])
@pytest.mark.parametrize(
    "name", ["differ, with biases", "opt heads", "heads that do not, with biases"]
)
def test_a_pruned_model_is_pruned_again(name: str, second: Layout, tmp_path: pathlib.Path) -> None:
    """Each form is a model like any other to read, and to write in another form."""
    config, heads, neurons, biases, _ = CASES[name]
    write(tmp_path / "first", pruned(config, heads, neurons, biases), config)
    first = open_checkpoint(tmp_path / "first")
    group = first.model.arch.group("neurons")
    again = tuple(
        cut(b, group, np.arange(len(b.v.w) * 0 + neurons[i]) % 2 == 0)
        for i, b in enumerate(first.model.blocks)
    )
    model = first.model._replace(blocks=again)
    write(tmp_path / "second", model, first.config, second)
    checkpoint = open_checkpoint(tmp_path / "second")
    np.testing.assert_allclose(
        logits(checkpoint.model, tiny.tokens()), logits(model, tiny.tokens()), atol=1e-5
    )
    assert (
        "widths" in checkpoint.config or not (tmp_path / "second" / "modeling_pruned.py").exists()
    )
    assert torch_agrees(tmp_path / "second", model)


def test_without_consent_transformers_refuses_a_class_that_ships_with_it(
    tmp_path: pathlib.Path,
) -> None:
    """No field is silently ignored: a loader that does not know the widths refuses the model."""
    pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    write(tmp_path / "out", pruned(GQA, [2, 3], [20, 21]), GQA)
    with pytest.raises(ValueError, match=r"trust_remote_code|custom code"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=False)


@pytest.mark.parametrize("config", [MISTRAL, SLIDING], ids=["mistral", "qwen2"])
def test_padded_biases_beside_a_sliding_window_are_refused(config: Mapping[str, Any]) -> None:
    with pytest.raises(InputError, match="sliding window with biases"):
        preview(config, ShapeChange(BOTH, alike=False, biased=True), "padded")


PREVIEWS = [
    (GQA, ShapeChange(), "auto", "stock llama"),
    (GQA, ShapeChange(("neurons",)), "auto", "stock llama"),
    (GQA, ShapeChange(BOTH, True, True), "auto", "stock llama, or another stock type"),
    (GQA, ShapeChange(BOTH, False, True), "auto", "topiary_llama"),
    (GQA, ShapeChange(BOTH, False, True), "padded", "stock llama"),
    (MISTRAL, ShapeChange(("neurons",), True, True), "auto", "topiary_mistral"),
    (OPT, ShapeChange(BOTH), "auto", "topiary_opt"),
    (OPT, ShapeChange(("neurons",), True, True), "auto", "stock opt"),
    (OPT, ShapeChange(BOTH, False), "padded", "stock opt"),
]


@pytest.mark.parametrize(("config", "leaves", "layout", "said"), PREVIEWS, ids=str)
def test_the_preview_names_the_form_that_is_written(
    config: Mapping[str, Any], leaves: ShapeChange, layout: Layout, said: str
) -> None:
    assert preview(config, leaves, layout).startswith(said)


def test_a_checkpoint_that_was_not_cut_keeps_its_configuration() -> None:
    dense, _, blocks = hf.specs(GQA)
    found = choose_form(GQA, [Shape(3, 40)] * len(blocks), dense.config.biases, "auto")
    assert {k: found.config[k] for k in GQA} == GQA


def test_the_configuration_has_both_spellings() -> None:
    scaled = {"rope_type": "linear", "factor": 4.0}
    new = with_dtype({**tiny.GQA, "rope_parameters": {"rope_theta": 500.0, **scaled}}, "bfloat16")
    assert (new["dtype"], new["torch_dtype"]) == ("bfloat16", "bfloat16")
    assert (new["rope_theta"], new["rope_scaling"]) == (500.0, scaled)
    assert hf.specs({k: v for k, v in new.items() if k != "rope_parameters"})[0] is hf.specs(new)[0]
    assert "rope_scaling" not in with_dtype(
        {**tiny.GQA, "rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}}, "float32"
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"widths": {"heads": [1], "neurons": [2, 2]}}, "widths"),
        ({"widths": {"heads": [1, 0], "neurons": [2, 2]}}, "widths"),
        ({"widths": None}, "widths"),
        ({"biases": ["zebra"]}, "biases"),
    ],
)
def test_a_broken_configuration_of_our_own_is_refused(
    change: dict[str, Any], said: str, tmp_path: pathlib.Path
) -> None:
    write(tmp_path / "out", pruned(GQA, [2, 3], [20, 21]), GQA)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    with pytest.raises(InputError, match=said):
        hf.specs(config | change)


def test_a_granite_model_with_plain_multipliers_is_a_llama() -> None:
    granite = {**GQA, "model_type": "granite", "attention_multiplier": 8**-0.5}
    assert jax.tree.structure(hf.specs(granite)[2]) == jax.tree.structure(hf.specs(GQA)[2])
    assert hf.specs(granite)[0].block is hf.specs(GQA)[0].block
    assert hf.specs(granite | {"logits_scaling": 8.0})[0].config.static.logits_divisor == 8
