"""Feed-forward networks on rows grouped by expert."""
