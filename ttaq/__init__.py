"""Keep a low-bit vision model accurate while the world around it changes."""
