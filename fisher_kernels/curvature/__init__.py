"""Curvature of layers: hooks collect sums in forward and backward, rules make factors or blocks of them.

``rules`` says what a rule is, ``diagonal_rules`` and ``block_rules`` have one for each type of layer, and ``hooks``
calls them.
"""
