"""`python -m ldarts.runs runs/a runs/b …`: the results' table."""
from . import main, script

if __name__ == "__main__":
    script(main)
