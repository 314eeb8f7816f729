"""Table 1: clean accuracy and robustness of ORTicket and its baselines, with two rows of Table 3 and a random ticket.

    python -m experiments.table1 --tasks sst2
    python -m experiments.table1 --tasks sst2 --model minilm --train-rows 20000 --epochs 3 --mask-epochs 2
    python -m experiments.table1 --methods Vanilla FreeLB --seeds 3                     more seeds of some rows
    python -m experiments.table1 --methods ORTicket --search learning-rate=2e-4 --output runs-2e-4    another search
    python -m experiments.table1 --methods ORTicket --search objective=sst2 --output runs-sst2        Table 4
    python -m experiments.table1 --methods Vanilla FreeLB ORTicket --model roberta-base               Table 5

Writes table1.md and table1.json to --results. A run that table1.json has is not repeated.
"""

from experiments.tables import make_table
from runtime import cli


def main():
    baselines = ("Vanilla", "PGD", "FreeLB", "InfoBERT", "RobustT")
    tickets = ("ORTicket", "ORTicket + FreeLB", "Vanilla ticket", "Random ticket")
    make_table("table1", baselines + tickets, __doc__)


if __name__ == "__main__":
    cli.run(main)
