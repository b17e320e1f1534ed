"""The evidence, repeatable.

    python -m ldarts.study gradient --data DATA --out studies/gradient  # does the gradient of Λ raise Λ?
    python -m ldarts.study collapse --data DATA --out studies/collapse  # does Λ prevent collapse?
    python -m ldarts.study gradient --out studies/gradient --show       # tables and pictures of what is there

Each finished case (a space, a variant, a seed) is one JSON file in --out and is not computed again, so a
study can be stopped, continued and extended. Tables go to --out/tables.md, pictures beside it where
matplotlib (extra `plot`) is installed.
"""
from ..runs import script
from .cases import main

if __name__ == "__main__":
    script(main)
