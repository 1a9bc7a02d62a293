"""Whole checkpoints of other libraries, read and written: names, configs, shards. The bits are in brise.quant.interop.

:mod:`.formats` is the table of them, :mod:`.reader` shows any of them as a folder of ours, :mod:`.export` writes them.
"""
