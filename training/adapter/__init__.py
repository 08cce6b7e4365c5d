"""What is trained beside the frozen weights, and its file."""
