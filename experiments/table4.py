"""Table 4: tickets of searches on each task and on masked language modelling, fine-tuned on every task."""

from experiments.runs import PAPER_TASKS
from experiments.tables import make_table
from runtime import cli


def main():
    rows = ("ORTicket", *(f"ORTicket from {task}" for task in PAPER_TASKS), "Vanilla")
    make_table("table4", __doc__, rows, ("Clean%", "Aua%"), across=True, attacks=("textfooler",))


if __name__ == "__main__":
    cli.run(main)
