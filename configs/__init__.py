"""Hydra configs of kanseg: `default.yaml`, the groups `model/` and `training/`, and one short file a run."""
