"""The sections of the configuration, as frozen dataclasses."""
