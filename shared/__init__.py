"""What the web side and the GPU worker must agree on; it imports neither of them."""
