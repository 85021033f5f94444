"""--protocol: what the papers calibrate and evaluate on, as values of flags. A table to read; docs/protocols.md says more.

Each row was read in the authors' released code, not in the paper, where the two differ.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from launch.flags.cli import Flags


class Protocol(NamedTuple):
    """Calibration and evaluation of a paper.

    calibration, samples, length, seed: the source of the windows, how many, of how many tokens, drawn how.
    evaluation, window: data sets whose perplexity is reported, in windows of so many tokens, all of them.
    source: the code it was read in. differs: in what a run of ours is not that code's, or "".
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
        """The values of the flags that it sets."""
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
    "SLEB's code shuffles the rows of WikiText-2, joins the first 128 and cuts what that gives one after the other: few windows, not 128; "
    "here they are drawn as SparseGPT does"
)
WORD_PERPLEXITY = (
    "LLMRank's code reports lm-eval's wikitext, a perplexity by words of detokenized text, which compares with no other; "
    "here it is that by tokens"
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
        "locuslab/wanda, main.py; OWL and AlphaPruning took it over",
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
    """--protocol, for a command with any of the flags that a protocol sets; one with --seeds has it set that to the one seed."""
    f.group("Calibration")
    known = {name: p.flags | {"seeds": str(p.seed)} for name, p in PROTOCOLS.items()}
    f.presets(
        "protocol",
        known,
        f"a paper's calibration and evaluation; flags that are given win: {', '.join(PROTOCOLS)}",
    )


def stamp(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """What the report's `protocol` has of --protocol: nothing without one; else its name, its source, in what runs differ from that, and
    the flags that were given other values than its own.

    Args:
      values: of a command's flags.
    """
    if not name:
        return {}
    protocol = PROTOCOLS[name]
    changed = {
        flag: values[flag]
        for flag, value in protocol.flags.items()
        if flag in values and values[flag] != value
    }
    differs = {"differs": protocol.differs} if protocol.differs else {}
    return {"name": name, "source": protocol.source, **differs, "overridden": changed}
