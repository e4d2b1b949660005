"""Dual encoders: `base` says what one must offer, and each family has its own file."""
