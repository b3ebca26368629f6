"""Small deliberate faults, as patches, and what shows that the fast tier of the tests catches each of them.

``python -m tests.mutants`` (``make mutants``) runs them; ``patches`` reads and applies one, ``scratch`` has the copy of
the checkout that they are applied to.
"""
