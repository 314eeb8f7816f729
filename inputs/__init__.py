"""Texts into batches: tokenizers, tables, the Hugging Face hub."""
