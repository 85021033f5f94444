"""Evaluation of models: perplexity, zero-shot tasks, size, speed. Sees no pruning method."""
