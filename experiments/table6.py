"""Table 6: ablation of what a ticket keeps, its pre-trained initialization and its structure."""

from experiments.tables import make_table
from runtime import cli


def main():
    rows = ("ORTicket", "w/o initialization", "w/o structure")
    make_table("table6", __doc__, rows, tasks=("sst2", "qnli", "qqp"), attacks=("textfooler",))


if __name__ == "__main__":
    cli.run(main)
