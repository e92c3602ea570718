"""The files of a released model: safetensors, their index, and weights in blocks of few bits."""
