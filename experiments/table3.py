"""Table 3: tickets of a search with and without an adversary, each fine-tuned with and without FreeLB."""

from experiments.tables import make_table
from runtime import cli


def main():
    rows = ("Vanilla ticket", "Vanilla ticket + FreeLB", "ORTicket", "ORTicket + FreeLB")
    make_table("table3", __doc__, rows, tasks=("imdb", "agnews", "qqp"))


if __name__ == "__main__":
    cli.run(main)
