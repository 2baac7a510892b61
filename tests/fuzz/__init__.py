"""Random calls of the ops, whatever may be passed in: the right numbers, or the error that is documented."""
