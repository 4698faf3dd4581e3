"""What each span of each KV head is worth, measured in the dense model."""
