"""The soak: a long training run with failures at random instants, compared bit by bit."""
