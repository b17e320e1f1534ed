"""Published cells, as a table: what `ldarts.genotypes.load` knows by name.

Λ-DARTS (Movahedi et al., 2023; corr: by Λ, sign: by Λ±; a number is the seed, else data set and space),
NASNet-A (Zoph et al., 2018), AmoebaNet-A (Real et al., 2019), DARTS (Liu et al., 2019).
"""
from .spaces import SHORT

# name: the edges of the normal and of the reduction cell, two a node: an operation and the state it reads;
# then the states that each cell concatenates, where they are not 2 to 5
_TABLE = {
    "c100_s1_lambdadarts_corr": ("dil3.0 dil5.1 dil5.0 sep3.1 dil3.3 skip.0 sep3.0 dil3.3",
                                 "max.1 max.0 dil5.2 max.1 dil5.3 sep3.1 dil5.4 dil5.3"),
    "c100_s2_lambdadarts_corr": ("sep3.0 skip.1 sep3.2 sep3.0 sep3.0 sep3.3 sep3.4 sep3.3",
                                 "sep3.0 sep3.1 sep3.2 sep3.1 sep3.3 sep3.2 sep3.3 sep3.4"),
    "c100_s3_lambdadarts_corr": ("sep3.0 sep3.1 sep3.0 sep3.1 sep3.0 sep3.1 sep3.2 sep3.1",
                                 "sep3.1 sep3.0 sep3.2 sep3.1 sep3.0 sep3.3 sep3.3 sep3.4"),
    "c100_s4_lambdadarts_corr": ("sep3.0 sep3.1 sep3.0 sep3.1 sep3.0 sep3.2 sep3.0 sep3.1",
                                 "sep3.0 sep3.1 sep3.0 sep3.1 sep3.0 sep3.1 sep3.0 sep3.2"),
    "c10_s1_lambdadarts_corr":  ("skip.1 dil3.0 dil5.0 sep3.1 sep3.1 sep3.2 max.1 dil5.4",
                                 "max.0 max.1 max.0 dil5.2 max.0 max.1 max.0 dil5.2"),
    "c10_s2_lambdadarts_corr":  ("skip.1 skip.0 sep3.2 skip.1 sep3.2 sep3.1 sep3.4 sep3.1",
                                 "sep3.0 skip.1 sep3.0 sep3.1 sep3.0 sep3.1 sep3.4 sep3.1"),
    "c10_s3_lambdadarts_corr":  ("skip.0 sep3.1 sep3.0 sep3.1 sep3.0 sep3.3 sep3.0 sep3.4",
                                 "sep3.1 sep3.0 skip.1 skip.0 sep3.0 sep3.1 sep3.1 skip.2"),
    "c10_s4_lambdadarts_corr":  ("sep3.0 sep3.1 sep3.0 sep3.1 sep3.0 sep3.1 sep3.0 sep3.1",
                                 "sep3.0 sep3.1 sep3.0 sep3.1 sep3.0 sep3.1 sep3.0 sep3.1"),
    "lambdadarts_corr_0":       ("sep5.0 skip.1 sep3.2 sep5.1 sep3.1 max.0 dil3.2 max.0",
                                 "skip.1 skip.0 max.0 dil3.2 dil5.3 dil5.1 skip.1 sep5.2"),
    "lambdadarts_corr_1":       ("sep3.0 sep5.1 sep3.1 sep3.0 sep3.1 skip.0 skip.0 sep3.1",
                                 "max.0 max.1 max.0 max.1 max.0 dil5.3 dil5.4 dil5.3"),
    "lambdadarts_corr_2":       ("sep3.0 sep3.1 sep3.1 skip.0 sep3.1 skip.0 sep3.4 dil3.3",
                                 "skip.0 max.1 max.0 sep5.1 dil5.3 max.0 dil5.3 dil5.4"),
    "lambdadarts_corr_3":       ("sep3.0 sep3.1 sep3.0 skip.1 sep3.1 sep3.0 dil5.4 max.1",
                                 "skip.0 skip.1 dil5.2 sep3.1 dil5.3 avg.0 skip.1 dil5.4"),
    "lambdadarts_sign_0":       ("sep5.1 sep3.0 dil5.2 dil3.0 dil3.3 sep3.0 dil3.4 skip.0",
                                 "sep3.0 max.1 skip.0 skip.2 sep5.3 dil3.2 dil5.4 sep5.3"),
    "lambdadarts_sign_1":       ("sep3.1 sep5.0 sep3.1 skip.0 sep3.2 sep3.1 max.0 dil5.4",
                                 "max.0 sep3.1 max.0 skip.2 dil5.3 max.0 dil5.2 sep5.0"),
    "lambdadarts_sign_2":       ("sep3.1 skip.0 sep3.2 sep3.1 dil5.3 sep3.1 dil3.3 sep5.2",
                                 "max.0 skip.1 max.0 dil5.2 max.0 dil5.3 dil5.4 dil5.3"),
    "lambdadarts_sign_3":       ("sep3.1 skip.0 sep3.1 sep3.2 sep3.1 dil5.3 dil3.3 dil3.2",
                                 "avg.1 max.0 skip.2 max.0 dil5.3 skip.2 skip.2 skip.3"),
    "svhn_s1_lambdadarts_corr": ("dil3.0 dil5.1 dil5.0 dil3.2 dil3.3 sep3.2 sep3.0 max.1",
                                 "max.1 max.0 dil5.2 max.1 dil5.3 dil3.2 dil5.3 dil5.4"),
    "svhn_s2_lambdadarts_corr": ("skip.1 sep3.0 sep3.2 sep3.1 sep3.1 sep3.0 sep3.3 sep3.1",
                                 "skip.0 skip.1 sep3.2 skip.1 skip.0 skip.1 sep3.2 sep3.4"),
    "svhn_s3_lambdadarts_corr": ("sep3.1 sep3.0 sep3.1 sep3.2 sep3.2 sep3.1 sep3.3 sep3.4",
                                 "sep3.0 sep3.1 sep3.2 sep3.0 sep3.3 sep3.2 sep3.3 sep3.4"),
    "svhn_s4_lambdadarts_corr": ("sep3.0 sep3.1 sep3.0 sep3.1 sep3.0 sep3.1 sep3.0 sep3.1",
                                 "sep3.0 sep3.1 sep3.0 sep3.2 sep3.0 sep3.1 sep3.0 sep3.3"),
    "NASNet":                   ("sep5.1 sep3.0 sep5.0 sep3.0 avg.1 skip.0 avg.0 avg.0 sep3.1 skip.1",
                                 "sep5.1 sep7.0 max.1 sep7.0 avg.1 sep5.0 skip.3 avg.2 sep3.2 max.1",
                                 (2, 3, 4, 5, 6), (4, 5, 6)),
    "AmoebaNet":                ("avg.0 max.1 sep3.0 sep5.2 sep3.0 avg.3 sep3.1 skip.1 skip.0 avg.1",
                                 "avg.0 sep3.1 max.0 sep7.2 sep7.0 avg.1 max.0 max.1 c71.0 sep3.5",
                                 (4, 5, 6), (3, 4, 6)),
    "DARTS_V1":                 ("sep3.1 sep3.0 skip.0 sep3.1 skip.0 sep3.1 sep3.0 skip.2",
                                 "max.0 max.1 skip.2 max.0 max.0 skip.2 skip.2 avg.0"),
    "DARTS_V2":                 ("sep3.0 sep3.1 sep3.0 sep3.1 sep3.1 skip.0 skip.0 dil3.2",
                                 "max.0 max.1 skip.2 max.1 max.0 skip.2 skip.2 max.1"),
}


def _edges(text: str) -> tuple[tuple[str, int], ...]:
    edges = [edge.split(".") for edge in text.split()]
    return tuple((SHORT[name], int(state)) for name, state in edges)


def _fields(normal: str, reduce: str, normal_concat=(2, 3, 4, 5), reduce_concat=(2, 3, 4, 5)) -> tuple:
    return _edges(normal), normal_concat, _edges(reduce), reduce_concat


CELLS = {name: _fields(*cells) for name, cells in _TABLE.items()}  # name: the fields of its Genotype
CELLS["LAMBDA_DARTS"] = CELLS["lambdadarts_corr_3"]
CELLS["DARTS"] = CELLS["DARTS_V2"]
