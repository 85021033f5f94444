"""Model families: configuration, forward pass, and tensor names of each."""
