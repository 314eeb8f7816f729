"""What leaves the project: published coefficients and MLM heads, exports to transformers, plots."""
