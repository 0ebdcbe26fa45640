"""Brings the online features of a request's rows and encodes them as the model's tensors."""
