"""Training of experts and router: losses, stage rules, optimizers, and the loop that applies them."""
