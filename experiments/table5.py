"""Table 5: another encoder, RoBERTa-base."""

from experiments.tables import make_table
from runtime import cli


def main():
    make_table("table5", __doc__, ("Vanilla", "FreeLB", "ORTicket"), model="roberta-base")


if __name__ == "__main__":
    cli.run(main)
