"""The files of a run directory: what a run writes as it trains, and checks when it is read."""
