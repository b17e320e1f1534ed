"""`python -m ldarts.runs runs/a runs/b …`: the results' table."""
from . import main, script

script(main)
