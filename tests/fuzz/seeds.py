"""Write the sound files that the fuzz cases damage."""

import gzip
import json
import pathlib
from typing import Any

import flax.serialization
import gguf
import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tokenizers
from flax.traverse_util import unflatten_dict
from safetensors.numpy import load_file, save_file

from models.checkpoint.gguf_names import ARCHITECTURES
from models.checkpoint.writer import save
from models.init import init_model

VOCAB, HEADS, HEAD_DIM, DIM, HIDDEN, BLOCKS, LENGTH = 260, 2, 8, 16, 24, 2, 12
COMMON: dict[str, Any] = dict(
    vocab_size=VOCAB,
    hidden_size=DIM,
    num_hidden_layers=BLOCKS,
    num_attention_heads=HEADS,
    max_position_embeddings=64,
    bos_token_id=256,
    eos_token_id=257,
)
LLAMA = COMMON | dict(
    model_type="llama",
    architectures=["LlamaForCausalLM"],
    intermediate_size=HIDDEN,
    num_key_value_heads=HEADS,
    head_dim=HEAD_DIM,
    hidden_act="silu",
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    tie_word_embeddings=False,
    initializer_range=0.3,
    attention_bias=False,
    rope_scaling={
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
)
OPT = COMMON | dict(
    model_type="opt",
    architectures=["OPTForCausalLM"],
    ffn_dim=HIDDEN,
    word_embed_proj_dim=DIM,
    init_std=0.3,
)
TEXTS = [f"{name} went to the lake and rowed a boat. " * 3 for name in ("Ann", "Bob", "Cy", "Dé")]
_ARCH = ARCHITECTURES["llama"]
GGUF_NAMES = {_ARCH.module(slot): part for part, (slot,) in _ARCH.parts().items()}
TASK = """task: stories
dataset_path: json
dataset_kwargs: {data_files: {test: stories.jsonl}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{text}}"
doc_to_target: end
doc_to_choice: "{{ends}}"
metadata: {version: 3}
"""


def byte_tokenizer() -> tokenizers.Tokenizer:
    """Return a byte-level tokenizer with two special tokens behind the bytes."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(alphabet)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 256)]
    )
    return tokenizer


def write_seeds(root: pathlib.Path) -> None:
    """Write models in every format, and data of every kind.

    Args:
      root: New directory.
    """
    base = root / "companions"
    base.mkdir(parents=True)
    byte_tokenizer().save(str(base / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "model_max_length": 64}
    (base / "tokenizer_config.json").write_text(
        json.dumps(config | {"tokenizer_class": "PreTrainedTokenizerFast"})
    )
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": [257, 256]}))
    for model in (LLAMA, OPT):
        save(root / model["model_type"], init_model(model, jax.random.key(1)), model, base)
    _write_formats(root, load_file(root / "llama" / "model.safetensors"))
    _write_data(root)
    _write_flags(root)


def _write_formats(root: pathlib.Path, state: dict[str, np.ndarray]) -> None:
    """Write the LLaMA model in the other formats."""
    for name in ("sharded", "msgpack", "bin"):
        (root / name).mkdir()
        for file in (root / "llama").iterdir():
            if not file.name.startswith(("model.", "pruning", "report")):
                (root / name / file.name).write_bytes(file.read_bytes())
    shards = [f"model-0000{k + 1}-of-00002.safetensors" for k in range(2)]
    place = {name: shards[i % 2] for i, name in enumerate(state)}
    for shard in shards:
        held = {n: v for n, v in state.items() if place[n] == shard}
        save_file(held, root / "sharded" / shard, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": place}
    (root / "sharded" / "model.safetensors.index.json").write_text(json.dumps(index))
    flat = {}
    for name, value in state.items():
        module, _, role = name.rpartition(".")
        if "embed_tokens" in name:
            role = "embedding"
        elif value.ndim == 2:
            role, value = "kernel", value.T
        flat[f"{module}.{role}".replace(".", "/")] = np.ascontiguousarray(value)
    packed = flax.serialization.to_bytes(unflatten_dict(flat, sep="/"))
    (root / "msgpack" / "flax_model.msgpack").write_bytes(packed)
    try:
        import torch
    except ImportError:
        pass
    else:
        tensors = {n: torch.from_numpy(v.copy()) for n, v in state.items()}
        torch.save(tensors, root / "bin" / "pytorch_model.bin")
    _write_gguf(root / "model.gguf", state)


def _write_gguf(path: pathlib.Path, state: dict[str, np.ndarray]) -> None:
    """Write the LLaMA model as GGUF, unpermuted: any weights do."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(BLOCKS)
    writer.add_context_length(64)
    writer.add_embedding_length(DIM)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(HEAD_DIM)
    tokens = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokens += ["<s>", "</s>", "he", "th"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    kinds = [gguf.TokenType.NORMAL] * 256 + [gguf.TokenType.CONTROL] * 2
    writer.add_token_types(kinds + [gguf.TokenType.NORMAL] * 2)
    writer.add_token_merges(["h e", "t h"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    outside = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for name, value in state.items():
        module, _, kind = name.rpartition(".")
        renamed = outside.get(module)
        if renamed is None:
            _, _, block, part = module.split(".", 3)
            renamed = f"blk.{block}.{GGUF_NAMES[part]}"
        writer.add_tensor(f"{renamed}.{kind}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_data(root: pathlib.Path) -> None:
    """Write token files and texts of every kind."""
    rng = np.random.default_rng(0)
    np.save(root / "tokens.npy", rng.integers(0, VOCAB, (4, LENGTH), np.int32))
    lines = "".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(TEXTS))
    (root / "texts.jsonl").write_text(lines)
    (root / "texts.json").write_text(json.dumps([{"text": text} for text in TEXTS]))
    (root / "texts.txt").write_text("\n".join(TEXTS))
    (root / "texts.raw").write_text(" \n = Title = \n \n" + " \n".join(TEXTS))
    (root / "texts.jsonl.gz").write_bytes(gzip.compress(lines.encode(), mtime=0))
    pq.write_table(pa.table({"id": range(len(TEXTS)), "text": TEXTS}), root / "texts.parquet")
    (root / "task").mkdir()
    (root / "task" / "stories.yaml").write_text(TASK)
    rows = [
        {"text": f"A {x} was", "ends": ["very happy.", "qq."], "end": 0} for x in ("dog", "cat")
    ]
    (root / "task" / "stories.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _write_flags(root: pathlib.Path) -> None:
    """Write two flag files, one of which names the other."""
    (root / "inner.flags").write_text("# windows\n--calibration_samples=4\n--eval_windows=2\n")
    (root / "outer.flags").write_text(
        f"--flagfile={root / 'inner.flags'}\n// method\n--method=magnitude\n--sparsity=0.5\n"
    )
