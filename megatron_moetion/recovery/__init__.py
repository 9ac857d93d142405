"""Recovery: load the state, replay the inbox, nothing else (design section 1)."""
