"""Which files the models are, and by which ids a worker serves them."""
