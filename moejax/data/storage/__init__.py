"""Prepared data on disk: records, the manifest, and folders that appear complete or not at all."""
