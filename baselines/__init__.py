"""The baselines of Table 1 that have a concept of their own: InfoBERT and RobustT."""
