"""KVTuner's offline search: which pair of K and V bits each layer needs (`python -m cocktail.tune`).

    calibration  prompts, read once; what any pairs cost on them
    profile      each layer's attention-output error under every candidate pair
    space        Pareto fronts, clusters of layers: what there is to choose from
    search       NSGA-II over one choice per cluster, in a study file
    report       the table, the plot and the pairs file
"""
