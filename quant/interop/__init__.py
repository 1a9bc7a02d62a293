"""Weights of other libraries' checkpoints, bit by bit: theirs <-> :class:`brise.quant.tensor.QuantizedTensor`.

A file a library. Each knows one weight and nothing of folders, shards and configs (:mod:`brise.model.foreign`).
"""
