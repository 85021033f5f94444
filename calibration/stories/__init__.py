"""Generate the embedded calibration text."""
