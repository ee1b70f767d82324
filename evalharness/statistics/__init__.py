"""Statistics of the evaluation: arrays in, numbers out."""
