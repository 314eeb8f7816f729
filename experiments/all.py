"""All tables and figures, one after another: `python -m experiments.all`, with the options of table1.py."""

import importlib

from runtime import cli


def main():
    for name in (*(f"table{number}" for number in range(1, 7)), "figure1", "figure2"):
        print(name, flush=True)
        importlib.import_module(f"experiments.{name}").main()


if __name__ == "__main__":
    cli.run(main)
