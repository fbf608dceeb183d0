"""A test reasoner on pretrained weights: problems in plain English, their checker, an adapter."""
