"""What a training is told to do, checked once."""
