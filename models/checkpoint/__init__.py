"""Read and write checkpoints: Hugging Face, GGUF, msgpack, Orbax."""
