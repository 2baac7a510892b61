"""The whole detector: what a frame takes, and a step of training."""
