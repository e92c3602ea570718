"""The families of Llama."""
