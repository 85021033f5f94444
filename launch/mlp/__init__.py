"""Data and report of `launch.mlprank`."""
