"""Statistics of routing, and the losses, metrics and router states that follow from them."""
