"""Calibration and evaluation settings of the papers, as values of flags for --protocol.

Each row was read in the authors' official code; where code and paper differ, the code counts.
docs/protocols.md shows the table.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from launch.flags.cli import Flags


class Protocol(NamedTuple):
    """Calibration and evaluation settings of a paper.

    Attributes:
      calibration: Source of the calibration windows.
      samples: Number of windows.
      length: Tokens in a calibration window.
      seed: Seed of the windows.
      evaluation: Data sets whose perplexity is reported, separated by commas.
      window: Tokens in an evaluation window; all windows are evaluated.
      source: Code that the settings were read in.
      differs: What a run here does differently from that code; empty if nothing.
    """

    calibration: str
    samples: int
    length: int
    seed: int
    evaluation: str
    window: int
    source: str
    differs: str = ""

    @property
    def flags(self) -> dict[str, Any]:
        """Return the values of the flags that the protocol sets."""
        return {
            "calibration": self.calibration,
            "calibration_samples": self.samples,
            "calibration_length": self.length,
            "seed": self.seed,
            "eval_data": self.evaluation,
            "eval_length": self.window,
            "eval_windows": 0,
        }


SLEB_ROWS = (
    "SLEB's code shuffles the rows of WikiText-2, joins the first 128 and cuts the text into "
    "consecutive windows, fewer than 128; here 128 windows are drawn as in SparseGPT"
)
WORD_PERPLEXITY = (
    "LLMRank's code reports lm-eval's wikitext, a perplexity per word of detokenized text, which "
    "is comparable to no other; here it is per token"
)

PROTOCOLS = {
    "sparsegpt2048": Protocol(
        "c4", 128, 2048, 0, "wikitext2,ptb,c4", 2048, "IST-DASLab/sparsegpt, opt.py and llama.py"
    ),
    "wanda2048": Protocol(
        "c4",
        128,
        2048,
        0,
        "wikitext2",
        2048,
        "locuslab/wanda, main.py; also used by OWL and AlphaPruning",
    ),
    "wanda4096": Protocol(
        "c4",
        128,
        4096,
        0,
        "wikitext2",
        4096,
        "locuslab/wanda, main.py since LLaMA-2: the model's whole context",
    ),
    "flap128": Protocol(
        "wikitext2",
        1024,
        128,
        0,
        "wikitext2",
        128,
        "CASIA-IVA-Lab/FLAP, main.py and scripts/llama_7b.sh",
    ),
    "sleb2048": Protocol(
        "wikitext2", 128, 2048, 0, "wikitext2,c4", 2048, "jiwonsong-dev/SLEB, sleb.py", SLEB_ROWS
    ),
    "sparsellm2048": Protocol(
        "c4", 32, 2048, 0, "wikitext2,ptb,c4", 2048, "BaiTheBest/SparseLLM, llama_main.py"
    ),
    "sparsellm2048-opt": Protocol(
        "c4", 64, 2048, 0, "wikitext2,ptb,c4", 2048, "BaiTheBest/SparseLLM, opt_main.py"
    ),
    "neuroal2048": Protocol(
        "c4", 128, 2048, 0, "wikitext2,c4,ptb", 2048, "eliacunegatti/NeuroAL, main.py"
    ),
    "llmrank2048": Protocol(
        "c4",
        64,
        2048,
        42,
        "wikitext2",
        2048,
        "amazon-science/llm-rank-pruning, llmrank/pipeline.py and utils.py",
        WORD_PERPLEXITY,
    ),
}


def protocol_flag(f: Flags) -> None:
    """Define --protocol, for a command with any of the flags that a protocol sets.

    Args:
      f: The command's flags. A flag `seeds`, a list, is set to the protocol's seed.
    """
    f.group("Calibration")
    presets = {name: p.flags | {"seeds": str(p.seed)} for name, p in PROTOCOLS.items()}
    text = (
        f"calibration and evaluation of a paper; flags that are given win: {', '.join(PROTOCOLS)}"
    )
    f.presets("protocol", presets, text)


def stamp(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the report's `protocol` says about --protocol.

    Args:
      name: Value of --protocol; empty if it is not given.
      values: Values of the command's flags.

    Returns:
      The protocol's name, its source, the differences of this project's runs from that source, and
      the flags whose values differ from the protocol's. Empty without a protocol.
    """
    if not name:
        return {}
    protocol = PROTOCOLS[name]
    overridden = {
        flag: values[flag]
        for flag, value in protocol.flags.items()
        if flag in values and values[flag] != value
    }
    result: dict[str, Any] = {"name": name, "source": protocol.source}
    if protocol.differs:
        result["differs"] = protocol.differs
    result["overridden"] = overridden
    return result
