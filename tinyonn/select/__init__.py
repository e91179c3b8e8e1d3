"""Which weights are kept: a score for each, a share for every tensor, and exact cuts."""
