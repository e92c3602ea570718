"""`moejax view`: runs in a browser while they train."""
