"""Tests of the folders and scripts; test_all.py at the top is the specification."""
