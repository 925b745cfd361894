"""Scores of label maps against references, and pictures and tables of them."""
