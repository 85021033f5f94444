"""Generated stories, the embedded calibration text."""
