"""Maps the tensors of a small model's adapter into a large model."""
