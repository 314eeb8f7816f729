"""Table 2: the speed of training relative to FreeLB, with and without the time of the search, and the parameters.

Nothing is attacked.
"""

from experiments.tables import make_table
from runtime import cli


def main():
    columns = ("speed", "with search", "M parameters", "GB")
    make_table("table2", __doc__, ("FreeLB", "Vanilla", "ORTicket"), columns)


if __name__ == "__main__":
    cli.run(main)
