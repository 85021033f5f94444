"""Parts of a run of launch.prune; other commands use some of them."""
