"""Data and reports of launch.mlprank."""
