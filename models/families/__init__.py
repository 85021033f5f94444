"""Model families: configurations, tensor names and forward functions."""
