"""Drawing pictures with the weights being trained."""
