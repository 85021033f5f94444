"""Methods that zero single weights of a linear."""
