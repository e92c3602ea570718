"""Where documents come from: installed corpora, prepared datasets, files, or a grammar."""
