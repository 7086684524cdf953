"""The method on tensors: nothing here knows models, hosts or configurations."""
