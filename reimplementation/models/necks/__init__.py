"""What stands between a backbone and the heads: pyramids of feature maps."""
