"""What the network learns: noise levels, noising, the velocity target and the loss."""
