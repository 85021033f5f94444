"""Prune language models after training.

The names below are the public API; each is imported when it is first used.

    model = pruning.open_model("embedded:tiny-llama")
    pruned = pruning.prune(model, "wanda", sparsity=0.5)
    print(pruning.perplexity(model), pruning.perplexity(pruned))
    pruning.save(pruned, "out/wanda")

Every method, allocation and refinement is also here under its name: `pruning.wanda()`,
`pruning.flap(structure="AL-AM")`, `pruning.owl()`, `pruning.dsnot()`.
"""

import importlib
from typing import Any

_MODULES = {
    "LanguageModel": "pruning.api",
    "open_model": "pruning.api",
    "perplexity": "pruning.api",
    "prune": "pruning.api",
    "save": "pruning.api",
    "pack": "models.checkpoint.pack",
    "unpack": "models.checkpoint.pack",
    "lost_zeros": "models.checkpoint.masks",
    "restore_zeros": "models.checkpoint.masks",
    "write_gguf": "models.checkpoint.gguf_writer",
    "Runtime": "calibration.runtime",
    "self_text": "calibration.generated",
    "Request": "pruning.types",
    "Outcome": "pruning.types",
    "METHODS": "pruning.methods",
    "ALLOCATIONS": "pruning.methods",
    "REFINEMENTS": "pruning.methods",
}
_MAKERS = (
    *("magnitude", "wanda", "multiflow", "sparsegpt", "sparsellm", "admm", "llmrank"),
    *("flap", "wanda_sp", "magnitude_sp", "sleb", "reap", "owl", "alpha", "neuroal", "dsnot"),
    *("ria", "dlp", "lsa", "atp", "evopress"),
    *("minitron", "two_ssp"),
)
__all__ = (*_MODULES, *_MAKERS)


def __getattr__(name: str) -> Any:
    """Return a public name, imported on first use."""
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    if name in _MAKERS:
        methods = importlib.import_module("pruning.methods")
        for table in (methods.METHODS, methods.ALLOCATIONS, methods.REFINEMENTS):
            if name in table:
                return table[name]
    raise AttributeError(f"module 'pruning' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
