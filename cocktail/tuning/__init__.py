"""Offline: what each layer's K and V need (`python -m cocktail.tune`), after KVTuner.

    calibration  prompts, read once; what any pairs cost on them
    space        Pareto fronts, clusters of layers: what there is to choose from
    profile      the error of each layer's attention output, as in the paper
    search       what each layer loses by itself, then NSGA-II over one choice per cluster, in a study file
    report       the table, the plot and the pairs file

KVTuner goes by the error of each layer's attention output (`--profile output`). By default a layer's K, and its V, is
stored at each width while everything else is exact, and what counts is the KL of the answer: equal errors matter very
differently by layer, and after as many trials the pairs found have up to 1.6 times less KL (bench/LOG.md).
"""
