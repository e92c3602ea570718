"""Using trained models: loading a run, and generating text with a cache of keys and values."""
