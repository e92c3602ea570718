"""The families of Qwen."""
