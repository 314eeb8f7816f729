"""How far do searches agree? The share of the pruned heads and neurons that two tickets have in common.

python -m experiments.overlap runs/a/minilm/coefficients.safetensors runs/b/minilm/coefficients.safetensors
"""

from dataclasses import dataclass

from checkpoints.tickets import read_coefficients
from experiments.tables import markdown_table
from gates import draw_masks
from runtime import cli
from runtime.cli import BadInput, option


@dataclass
class Options:
    coefficients: tuple = option((), "files of search.py", positional=True)
    tau_head: float = option(1 / 6, "pruning ratio of the heads", at_least=0, below=1)
    tau_ffn: float = option(0.3, "pruning ratio of the neurons", at_least=0, below=1)


def main():
    options = cli.parse(Options, __doc__)
    tickets = []
    for path in options.coefficients:
        metadata = read_coefficients(path)[2]
        for seed in metadata.get("seeds", [metadata["settings"]["seed"]]):  # several, if `sharing.publish` wrote them
            head, ffn, _ = read_coefficients(path, seed)
            tickets.append(draw_masks(head, ffn, options.tau_head, options.tau_ffn))
            if [mask.shape for mask in tickets[-1]] != [mask.shape for mask in tickets[0]]:
                remedy = "compare models of the same sizes"
                raise BadInput(f"{path} and {options.coefficients[0]} are of models of different sizes: {remedy}")
            print(f"{len(tickets)}: {path}, seed {seed}")
    names = [str(number) for number in range(1, len(tickets) + 1)]
    cells = [[" / ".join(f"{share:.1%}" for share in overlap(ours, other)) for other in tickets] for ours in tickets]
    print(markdown_table(["heads / neurons", *names], [[name, *row] for name, row in zip(names, cells)]), end="")
    print(f"\nTwo random tickets would share about {options.tau_head:.0%} / {options.tau_ffn:.0%}.")


def overlap(ticket, other):
    """(share of the pruned heads, share of the pruned neurons) of a ticket, a pair of masks, that the other prunes."""
    return [(~mask & ~others).sum().item() / max(1, (~mask).sum().item()) for mask, others in zip(ticket, other)]


if __name__ == "__main__":
    cli.run(main)
