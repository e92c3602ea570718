"""Where documents come from: an installed corpus, a prepared dataset, the user's files, or a grammar."""
