"""The report of a run and the comparison of several, as HTML pages that stand alone."""
