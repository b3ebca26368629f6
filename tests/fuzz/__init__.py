"""Random calls of the ops, next to definitions of their own.

Each ``test_<stem>.py`` says how a call is drawn, what the op is in plain numpy, and how far rounding may take a result
from that. Definitions share nothing with the reference implementations, the samples or the other tests. They compute in
float64 for what a kernel computes in float32, and in numpy's longdouble for what it computes in float64.

``operands`` draws numbers and lays them in memory between guards, ``calls`` runs a call and looks after them, and
``closeness`` compares.
"""
