"""The Hugging Face layout: `config.json`, and weights in safetensors files.

A family is one file in `families/`: two tables, of the keys of `config.json` and of the tensors,
that are read in both directions.
"""
