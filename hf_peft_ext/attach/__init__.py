"""The idea of this package: placements, and the tuner that attaches their sub-layers to a model."""
