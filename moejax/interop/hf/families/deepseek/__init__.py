"""The families of DeepSeek."""
