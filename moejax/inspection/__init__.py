"""Looking at runs: their record, what experts specialise in, figures, and the report."""
