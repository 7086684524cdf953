"""Images from a request: checked first, made stock or accelerated, written with all that repeats them."""
