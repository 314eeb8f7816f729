"""All tables and figures, one after another: `python -m experiments.all`, with the options of table1.py."""

import subprocess
import sys

from runtime import cli

EXPERIMENTS = ("table1", "table2", "table3", "table4", "table5", "table6", "figure1", "figure2")


def main():
    for name in EXPERIMENTS:
        print(f"python -m experiments.{name} {' '.join(sys.argv[1:])}", flush=True)
        code = subprocess.run([sys.executable, "-m", f"experiments.{name}", *sys.argv[1:]]).returncode
        if code:
            sys.exit(code)


if __name__ == "__main__":
    cli.run(main)
