"""All optimizers on all tasks: the runs behind ``docs/results.md``, ``docs/choosing.md`` and ``docs/tuning.md``.

``plan`` says what is compared and how long a run is, ``search`` finds learning rates, ``runs`` carries runs out and
keeps their figures in ``bench/results/study/``, ``pages`` makes tables and pictures of them.
"""
