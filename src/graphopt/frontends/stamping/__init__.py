"""Capture by stamping: equal layers are exported twice, and the others are copies of the graph with their own weights.

One run of the whole model on tensors without values is recorded (``record``), and layers with equal records are one
kind (``kinds``). The model is exported with two layers of each kind, the others left out (``shorten``); the two instances
are matched with each other (``match``), and the graph of the first is copied for each layer that was left out (``stamp``).
"""
