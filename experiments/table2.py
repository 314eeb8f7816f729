"""Table 2: cost of training (seconds, peak memory, parameters) with FreeLB, without an adversary, and of a ticket.

    python -m experiments.table2 --tasks imdb

The options are those of table1.py, but nothing is attacked.
"""

from experiments.tables import make_table
from runtime import cli


def main():
    rows = ["FreeLB", "Vanilla", "ORTicket"]
    make_table("table2", rows, __doc__, attacked=False)


if __name__ == "__main__":
    cli.run(main)
