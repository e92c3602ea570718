"""The loop that turns a configuration and a corpus into a run directory."""
