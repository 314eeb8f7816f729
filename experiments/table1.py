"""Table 1: clean accuracy and robustness of ORTicket, its baselines and a random ticket.

    python -m experiments.table1 --dry-run                                          hours of the paper's table
    python -m experiments.table1 --quick                                            a small version, offline
    python -m experiments.table1 --tasks sst2 --seeds 5
    python -m experiments.table1 --methods FreeLB --finetune adv-lr=0.1 adv-init-mag=1 adv-max-norm=0.6
    python -m experiments.table1 --methods ORTicket --search learning-rate=2e-4     another search, as a separate row

The defaults are the paper's protocol: all rows, 10 epochs, three attacks on all of SST-2 and 1,000 rows of the other
tasks, a search on WikiText-2. Each seed has its own search and random ticket. All methods and seeds attack the
same sentences. Writes table1.md and table1.json to --results. Runs in table1.json are not repeated.
"""

from experiments.tables import make_table
from runtime import cli


def main():
    baselines = ("Vanilla", "PGD", "FreeLB", "InfoBERT", "RobustT")
    make_table("table1", __doc__, (*baselines, "ORTicket", "Random ticket"))


if __name__ == "__main__":
    cli.run(main)
