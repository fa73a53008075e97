"""A real federation on Flower (extra "flower"): the same rounds and the same clients as the simulator's, over a network.

`deploy` writes a Flower app of an experiment; its two shims call `server` and `node`, which meet through the records of `wire`.
Only `wire` imports flwr, and only when it is used.
"""
