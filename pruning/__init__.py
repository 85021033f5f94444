"""The pruning methods, as small pure parts that compose. `pruning.methods` is the table of contents."""
