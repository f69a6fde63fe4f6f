"""What training and inference cost: memory, operations, money."""
