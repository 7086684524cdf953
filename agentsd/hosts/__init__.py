"""One file for each host: find its layers, put hooks on, take them off."""
