"""What leaves the project: exports to transformers, plots."""
