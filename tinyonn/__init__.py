"""Tiny-ONN: take a dense language model apart while it works, weight by weight.

Shape suffixes of tensor names: ``T`` tokens of a sample, ``I`` inputs of a linear layer, ``O`` its outputs,
``V`` vocabulary, ``B`` histogram bins. ``X_TI`` is a layer's input, ``G_TO`` the gradient of its output,
``W_OI`` its weight.
"""
