"""What ``pydrone doctor`` finds out: what this machine has, and whether each kernel computes what it should."""
