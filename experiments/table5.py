"""Table 5: another encoder, RoBERTa-base.

    python -m experiments.table5 --tasks sst2

The options are those of table1.py.
"""

from experiments.tables import make_table
from runtime import cli


def main():
    make_table("table5", ("Vanilla", "FreeLB", "ORTicket"), __doc__, model="roberta-base")


if __name__ == "__main__":
    cli.run(main)
