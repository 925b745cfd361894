"""Prediction: from an image on disk to a label map on its own grid."""
