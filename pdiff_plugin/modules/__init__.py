"""What is done with a user's module: its tensors' names, swapping weights in, modes, batches, the trunk cache."""
