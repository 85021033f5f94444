"""Random LLaMA checkpoints of any size, made block by block.

Usage: python tests/reference/synthetic.py DIRECTORY [JSON over LARGE]
"""

import json
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from models.families import hf

# Two billion parameters: 39 blocks of 50.6 million, and 131 million in the embedding, which is also
# the head.
LARGE = {
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 5504,
    "num_hidden_layers": 39,
    "num_attention_heads": 16,
    "max_position_embeddings": 2048,
    "vocab_size": 32000,
    "tie_word_embeddings": True,
}


def write(directory: pathlib.Path, config: Mapping[str, Any], seed: int = 0) -> pathlib.Path:
    """Write a float16 checkpoint, a shard for each block, and tokens.npy.

    One block is in memory at a time.
    """
    directory.mkdir(parents=True, exist_ok=True)
    rng, (_, non_block, blocks) = np.random.default_rng(seed), hf.specs(config)
    parts, where, total = [non_block, *blocks], dict[str, str](), 0
    for k, part in enumerate(parts):
        file = f"model-{k + 1:05d}-of-{len(parts):05d}.safetensors"
        tensors = {}
        for spec in jax.tree.leaves(part, is_leaf=hf.is_spec):
            # So that neither activations nor the residual stream grow much from block to block.
            scale = 0.0 if spec.init == "ones" else 0.3 / np.sqrt(spec.shape[-1])
            draw = rng.standard_normal(spec.shape, np.float32) * np.float32(scale) + np.float32(
                spec.init == "ones"
            )
            tensors[spec.name] = draw.astype(np.float16)
        save_file(tensors, directory / file, metadata={"format": "pt"})
        where |= dict.fromkeys(tensors, file)
        total += sum(x.nbytes for x in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps({**config, "torch_dtype": "float16"}))
    np.save(directory / "tokens.npy", rng.integers(0, config["vocab_size"], (4, 128), np.int32))
    return directory


if __name__ == "__main__":
    write(pathlib.Path(sys.argv[1]), LARGE | json.loads(sys.argv[2] if len(sys.argv) > 2 else "{}"))
