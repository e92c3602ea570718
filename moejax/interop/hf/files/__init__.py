"""The files of a released model: safetensors with their index, and weights in blocks of few bits."""
