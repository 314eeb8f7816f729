"""Tests of the rooms; test_all.py at the top is the specification."""
