"""Dual encoders: `base` says what one must offer, each family has its own file, `families` lists them."""
