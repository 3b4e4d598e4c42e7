"""One PPO update: losses, gradients by autograd or by one operation, Adam; and acting with the same operations."""
