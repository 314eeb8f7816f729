"""Publish coefficients: pack several searches into one file with a plot. Also, where draw.py finds such files.

    python search.py --seeds 10
    python -m sharing.publish runs/minilm/coefficients-seed*.safetensors --output FOLDER

FOLDER/coefficients.safetensors then holds `head` (searches, layers, heads) and `ffn` (searches, layers, neurons) with
the provenance of the searches, which may differ in the seed alone. The plot beside it shows how far their masks agree.
"""

import runtime.start  # noqa: F401 # isort: skip

import re
from dataclasses import dataclass
from pathlib import Path

import torch

import data
from checkpoints import safetensors
from checkpoints.provenance import differences, note_other_code, without_paths
from checkpoints.tickets import read_coefficients
from gates import draw_masks
from inputs import hub
from runtime import cli, files
from runtime.cli import BadInput, first_few, option
from sharing.plots import plot_survival, survival_shares

NAME = "coefficients.safetensors"


@dataclass
class Options:
    coefficients: tuple = option((), "files of search.py", positional=True)
    output: str = option("tickets", "folder; or a file that ends in .safetensors")
    overwrite: bool = option(False, "replace an existing file")


def main():
    options = cli.parse(Options, __doc__)
    path = Path(options.output)
    path = path if path.suffix == ".safetensors" else path / NAME
    if path.exists() and not options.overwrite:
        raise BadInput(f"{path} exists: use --overwrite or another --output")
    tensors, metadata = pack(options.coefficients)
    safetensors.write_safetensors(path, tensors, metadata)
    settings, seeds = metadata["settings"], metadata["seeds"]
    masks = [draw_masks(*each, settings["tau_head"], settings["tau_ffn"]) for each in zip(*tensors.values())]
    picture = path.with_suffix(".png")
    plot_survival({settings["model"]: survival_shares(masks)}, len(seeds), picture)
    print(f"searches of {settings['model']} with seeds {', '.join(map(str, seeds))}: {path}, {picture}")
    print(f"to publish them: hf upload OWNER/NAME {path} {NAME}")


def pack(paths):
    """({name: tensor}, metadata) of several searches, in the order of their seeds. Of local paths, to the model, the
    corpus and the task, only the last name is kept.

    Raises BadInput if they differ in more than the seed.
    """
    searches, common = {}, None
    for path in paths:
        head, ffn, metadata = read_coefficients(path)
        if "seeds" in metadata:
            raise BadInput(f"{path} holds several searches: give the files of search.py")
        seed, stopped_early = metadata["settings"].pop("seed"), metadata.pop("stopped_early", None)
        if seed in searches:
            raise BadInput(f"{path} is a second search with seed {seed}: give each once")
        common = common or metadata
        if what := differences(common["settings"], metadata["settings"]) or differences(common, metadata):
            remedy = "give searches that differ in the seed alone"
            raise BadInput(f"{path} and {paths[0]} differ in {first_few(what)}: {remedy}")
        mini_epochs = len(safetensors.read_safetensors(path)[0].get("trace.loss", ()))
        searches[seed] = head, ffn, mini_epochs, stopped_early
    seeds = sorted(searches)
    heads, ffns, mini_epochs, stopped_early = zip(*(searches[seed] for seed in seeds))
    common["settings"] = without_paths(common["settings"])
    own = {"script": "publish.py", "seeds": seeds, "mini_epochs": mini_epochs, "stopped_early": stopped_early}
    return {"head": torch.stack(heads), "ffn": torch.stack(ffns)}, common | own


def load_coefficients(options, folder):
    """(c_H, c_F, metadata) for draw.py: from --coefficients, from search.py in `folder`, or else from this project.
    The metadata also has the "sha256" of the file and its published "source", None for a local file.

    Raises BadInput if there are none, or if they are not those of --model.
    """
    path, source = find_coefficients(options, folder)
    head, ffn, metadata = read_coefficients(path, options.coefficients_seed)
    settings = metadata["settings"]
    model = settings["model"]
    if files.model_folder("", model) != files.model_folder("", options.model):
        raise BadInput(f"{path} holds coefficients of model {model}: add --model {model}")
    if options.model in data.BUNDLED and metadata["model_sha256"] != data.BUNDLED[options.model][-1]:
        raise BadInput(f"{path} holds coefficients of another model than {model}: restore a copy, or search again")
    if metadata["script"] == "search.py":
        note_other_code(path, metadata)
    if source and not options.coefficients:
        print(f"no search in {folder}: using {source}, seed {settings['seed']} (python search.py makes your own)")
    return head, ffn, metadata | {"sha256": files.sha256(path), "source": source}


def find_coefficients(options, folder):
    """(path of the coefficients, their published source, None for a local file)."""
    given, path = options.coefficients, Path(options.coefficients or folder)
    if path.is_file() or (path / NAME).is_file():
        return path if path.is_file() else path / NAME, None
    if given and not path.exists() and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w.-]+)?", given):
        repository, _, revision = given.partition("@")
        try:
            path = hub.fetch(repository, NAME, revision or "main")
        except BadInput as error:
            raise BadInput(f"--coefficients {given} is neither a file or folder nor on the hub: {error}") from None
        return path, f"{repository}@{path.parent.name}"
    if given:
        raise BadInput(f"--coefficients {given}: give a file, a folder with {NAME}, or OWNER/NAME on the hub")
    published = data.PUBLISHED / f"{Path(options.model).name}-bbc.safetensors"
    searched = [*folder.glob("coefficients*"), *folder.glob("search*.safetensors")]  # including unfinished ones
    if searched or options.model not in data.BUNDLED or not published.is_file():
        others = [path for path in searched if path.name.startswith("coefficients-")]  # of --seeds or an --objective
        remedy = f"run python search.py{cli.flags(options, 'model', 'output')} first"
        remedy = f"give --coefficients {min(others)}, or {remedy}" if others else remedy
        raise BadInput(f"there is no {folder / NAME}: {remedy}")
    return published, f"the published coefficients of {options.model} on BBC News"


if __name__ == "__main__":
    cli.run(main)
