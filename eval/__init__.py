"""What a model is worth: perplexity and size. Sees models only, never a pruning method."""
