"""Python imports this on its way up, and says so in a process of torchrun when it ends."""

import atexit
import os

if "RANK" in os.environ:
    atexit.register(print, "Python ends")
