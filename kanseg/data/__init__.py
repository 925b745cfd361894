"""Data: layouts, files with geometry, splits, plans, preprocessing and loading."""
