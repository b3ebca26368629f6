"""All optimizers on all tasks, at equal time and at equal steps; ``docs/tuning.md`` has the rates it has found so far.

``plan`` says what is compared and how long a run is, ``tuning`` finds learning rates by the search of ``rates``,
``runs`` carries runs out and keeps their figures in ``bench/results/study/``, ``results`` sums them up over the seeds,
``pages`` and ``pictures`` show them.
"""
