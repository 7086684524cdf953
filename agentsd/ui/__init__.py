"""The web page: one prompt, stock and accelerated side by side."""
