"""Write the model card of a pruned model: `README.md`, as the hub reads it."""

import functools
import os
import pathlib
import re
import shlex
from collections.abc import Mapping
from typing import Any

import jinja2

from launch import __version__
from launch.flags import quoting
from launch.report import recovered, summary
from models.checkpoint.hub import HUB_ID, is_embedded
from models.checkpoint.hub_client import Source, source_of

CARD = "README.md"
TEMPLATES = pathlib.Path(__file__).parents[1] / "report" / "templates"
LONGEST_CARD = 1 << 20  # bytes of a source's card that are read
# Fields that a pruned model has in common with its source.
KEPT = ("license", "license_name", "license_link", "language")
PERPLEXITY = (
    "Perplexity is exp of the mean over windows of the mean cross-entropy over all predicted "
    "positions, without a BOS of its own for each window."
)


def write_card(directory: pathlib.Path, result: Mapping[str, Any], source: pathlib.Path) -> None:
    """Write the card of a pruned model.

    Args:
      directory: Directory of the pruned model.
      result: The report.
      source: Directory or file of the dense model.
    """
    text = _template().render(
        metadata=_metadata(directory, result, source).to_yaml(),
        title=_title(result, source),
        lead=_lead(result, source),
        headings=recovered.headings(result),
        rows=recovered.rows(result),
        removed=_removed(result),
        figures=_figures(result),
        snippet=_snippet(result),
        command=public_command(result["command"], source_of(source)),
        version=__version__,
    )
    (directory / CARD).write_text(text, encoding="utf-8", errors="replace")


@functools.cache
def _template() -> jinja2.Template:
    """Load the template."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    # A bar in a name would begin another column.
    environment.filters["cell"] = lambda text: str(text).replace("|", "\\|")
    return environment.get_template("card.md.j2")


def _metadata(directory: pathlib.Path, result: Mapping[str, Any], source: pathlib.Path) -> Any:
    """Return the card's metadata, with what the source's own card says of licence and language."""
    from huggingface_hub import ModelCardData

    own = source_metadata(source)
    kept = {field: own[field] for field in KEPT if field in own}
    if is_embedded(source):
        kept = {"license": "apache-2.0", "language": "en"}
    licences = sorted(path.name for path in directory.glob("LICEN[CS]E*"))
    if "license" not in kept and licences:
        kept |= {"license": "other", "license_link": licences[0]}
    origin = source_of(source)
    base = origin.repository if origin else own.get("base_model")
    method = str(result["method"]).partition("(")[0]
    return ModelCardData(
        base_model=base,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["topiary", "pruned", method],
        **kept,
    )


def source_metadata(source: pathlib.Path) -> dict[str, Any]:
    """Read the metadata of the source's card as far as it makes sense.

    Args:
      source: Directory or file of the dense model.

    Returns:
      Texts or lists of texts by field. Empty if there is no card, or it cannot be read: a card is
      written by hand, and must not cost the pruned model.
    """
    from huggingface_hub import metadata_load

    card = (source if source.is_dir() else source.parent) / CARD
    try:
        data = metadata_load(card) if card.stat().st_size <= LONGEST_CARD else None
    except Exception:  # no file, no UTF-8, no YAML, nested too deeply
        return {}
    fields = {field: value for field, value in (data or {}).items() if _is_text(value)}
    bases = fields.get("base_model", ())
    if not all(HUB_ID.fullmatch(name) for name in ([bases] if isinstance(bases, str) else bases)):
        del fields["base_model"]  # such as the path of a directory
    return fields


def _is_text(value: Any) -> bool:
    """Return True for a text, or a list of texts."""
    items = value if isinstance(value, list) and value else [value]
    return all(isinstance(item, str) for item in items)


def _name(result: Mapping[str, Any], source: pathlib.Path) -> str:
    """Return the dense model's name for people, without a path of this machine."""
    origin = source_of(source)
    if origin:
        return origin.repository
    return str(result["model"]).rstrip("/").rpartition("/")[2] or source.name


def _title(result: Mapping[str, Any], source: pathlib.Path) -> str:
    """Return the card's heading."""
    name = _name(result, source).rpartition("/")[2]
    return f"{name}, pruned by {result['method']}"


def _lead(result: Mapping[str, Any], source: pathlib.Path) -> str:
    """Return the first sentences."""
    origin, sparsity = source_of(source), result["sparsity"]
    name = _name(result, source)
    dense = (
        f"[{name}](https://huggingface.co/{name}) at commit `{origin.commit}`" if origin else name
    )
    return (
        f"This is {dense} after pruning by `{result['method']}`: "
        f"{summary.percent(sparsity['prunable'])} of the prunable parameters are zero or gone, "
        f"{summary.percent(sparsity['total'])} of all. {_training(result)}"
    )


def _training(result: Mapping[str, Any]) -> str:
    """Return a sentence that says whether the model was trained after pruning."""
    if "recovery" not in result:
        return "It was not trained again."
    stages = result["recovery"]["stages"]
    names = " and ".join(f"`{stage['recover']}`" for stage in stages)
    tokens = summary.count(sum(stage["tokens"] for stage in stages))
    return (
        f"What is left was then trained towards the dense model by {names} on {tokens} tokens; "
        "the same weights are zero as before."
    )


def _removed(result: Mapping[str, Any]) -> list[str]:
    """Return how the parameters were chosen, and what the model loads as."""
    settings, calibration = result["settings"], result["protocol"]["calibration"]
    facts = [f"Method: `{result['method']}`"]
    for field, default in (
        ("pattern", "unstructured"),
        ("allocation", "uniform"),
        ("refine", "none"),
    ):
        if settings[field] != default:
            facts.append(f"{field.capitalize()}: `{settings[field]}`")
    for part in calibration.get("parts", [calibration]):
        # A part has its own source and number of windows, and the rest of the whole.
        own = calibration | {"samples": part.get("windows", calibration["samples"])} | part
        facts.append(f"Calibration: {_windows(own)}, seed {settings['seed']}")
    facts.append(f"Type: `{settings['dtype']}`")
    facts.append(f"Loads as: {result['loads_as']}")
    return facts


def _figures(result: Mapping[str, Any]) -> list[str]:
    """Return the protocol of the figures."""
    protocol = result["protocol"]
    facts = [PERPLEXITY] if result["perplexity"] else []
    labels = summary.short_names(result["perplexity"])
    for name, data in protocol["evaluation"].items():
        facts.append(f"{labels.get(name, name)}: {_windows(data)}")
    for task in protocol.get("tasks", {}):
        facts.append(f"{summary.short_names([task])[task]}: lm-evaluation-harness")
    versions = protocol["versions"]
    facts.append(
        f"Device: {protocol['device']['count']} x {protocol['device']['kind']}, "
        f"JAX {versions['jax']}, Python {versions['python']}"
    )
    return facts


def _windows(data: Mapping[str, Any]) -> str:
    """Return in words how windows of a data set were read."""
    name = str(data.get("dataset", data["source"])).rstrip("/")
    commit, split = data.get("commit"), data.get("split")
    text = name if commit else name.rpartition("/")[2]
    text += f" at commit `{commit}`" if commit else ""
    text += f", {split}" if split else ""
    text += f", {data['samples']} windows of {data['length']} tokens"
    text += f" ({data['cut']})" if data.get("cut") else ""
    return f"{text}, SHA-256 of the tokens `{data['sha256'][:16]}…`"


def _snippet(result: Mapping[str, Any]) -> str:
    """Return five lines of Python that load the model and continue a text."""
    name = result["settings"]["push_to_hub"] or "DIRECTORY"
    remote = ", trust_remote_code=True" if "trust_remote_code" in result["loads_as"] else ""
    return f'''from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}"{remote})
tokens = tokenizer("Once there was", return_tensors="pt")
print(tokenizer.decode(model.generate(**tokens, max_new_tokens=32)[0]))'''


def public_command(command: str, origin: Source | None) -> str:
    """Return a command without the paths of this machine.

    Args:
      command: The command, with flags of the form --name=value.
      origin: Origin of the model, which takes the place of its name; None if it is not on the hub.
    """
    words = []
    for word in shlex.split(command):
        flag, equals, value = word.partition("=")
        if flag in ("--revision", "--push_to_hub"):
            continue
        if flag == "--model" and origin:
            value = f"{origin.repository}@{origin.commit}"
        elif flag == "--output":
            value = "OUTPUT"
        elif flag == "--calibration":
            # A mix, or a call with the file of prompts.
            value = re.sub(r"""[^,('"]*/""", "", value)
        elif equals and not re.search(r"[(\"']", value):
            # Calls of methods have no paths, and may hold commas.
            value = ",".join(os.path.basename(item.rstrip("/")) for item in value.split(","))
        words.append(f"{flag}{equals}{value}")
    return quoting.join(words)
