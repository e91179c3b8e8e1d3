"""How good a cut model is: held-out loss of every method at every budget."""
