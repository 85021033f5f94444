"""Palette of the plots: Paul Tol's "vibrant" scheme (SRON/EPS/TN/09-002).

Colour-blind readers can tell its colours apart.
"""

BLUE, ORANGE, TEAL, GREY = "#0077bb", "#ee7733", "#009988", "#999999"
# Colours and markers of the curves of a plot; the marker repeats what the colour says.
COLOURS = (BLUE, ORANGE, TEAL, "#cc3311", "#33bbee", GREY, "#ee3377")
MARKERS = "osD^vXP*"
