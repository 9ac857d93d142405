"""The inbox: all that enters a stage from outside it, written in training, read in replay."""
