"""The families of Granite."""
