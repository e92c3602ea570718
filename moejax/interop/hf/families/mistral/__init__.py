"""The families of Mistral."""
