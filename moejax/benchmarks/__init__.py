"""What `moejax bench` measures: within one run, in turn; figures are medians, ratios come first."""
