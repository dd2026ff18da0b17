"""Put a trained pocket model into the package, and keep the text it is measured on.

1. Round the checkpoint's master weights to bfloat16; save model and tokenizer as an ordinary Hugging Face folder.
2. Save the training curve next to it, and the held-out documents next to this file.
3. Measure the saved folder, and add the results to the training curve's file.
"""

import json
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch
from held_out_text import HELD_OUT_FILE, is_held_out, without_repeats, write_held_out
from make_tokenizer import wrap_tokenizer
from pocket_model import CONTEXT, load_checkpoint, make_model
from pocket_quality import Quality, measure_folder
from tokenizers import Tokenizer

from saemill.harvest.corpus.stdlib import stdlib_documents, text_digest
from saemill.harvest.pocket import MODEL_FOLDER

PACKAGE = MODEL_FOLDER.parent


def save_model(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    """The master weights of a checkpoint as a bfloat16 model."""
    model = make_model(seed=0).bfloat16()
    masters = {key.removeprefix("master/"): tensor for key, tensor in tensors.items() if key.startswith("master/")}
    model.load_state_dict({**masters, "lm_head.weight": masters["model.embed_tokens.weight"]})
    model.save_pretrained(folder)


def save_tokenizer(tokenizer_file: Path, folder: Path) -> None:
    wrap_tokenizer(Tokenizer.from_file(str(tokenizer_file)), CONTEXT).save_pretrained(folder)
    config_file = folder / "tokenizer_config.json"
    config = json.loads(config_file.read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that older versions of transformers know too
    config_file.write_text(json.dumps(config, indent=2) + "\n")


def describe(
    record: dict[str, Any], trained: list[tuple[str, str]], held_out: list[tuple[str, str]], quality: list[Quality]
) -> dict[str, Any]:
    """The content of training_curve.json."""
    return {
        "python": platform.python_version(),
        "corpus": record["corpus"],
        "trained": _count(trained),
        "held_out": _count(held_out),
        "steps": record["step"],
        "tokens_seen": record["tokens"],
        "minutes": round(record["seconds"] / 60, 1),
        "quality": [{**asdict(one), "gain": one.gain} for one in quality],
        "curve": record["curve"],
    }


def _count(documents: list[tuple[str, str]]) -> dict[str, int]:
    return {"documents": len(documents), "characters": sum(len(text) for _, text in documents)}


@click.command(help=__doc__)
@click.option(
    "--run", type=click.Path(path_type=Path, exists=True), required=True, help="Folder of train_pocket.py's --out."
)
@click.option("--to", type=click.Path(path_type=Path), default=PACKAGE, show_default=True, help="Folder to write into.")
def main(run: Path, to: Path) -> None:
    found = load_checkpoint(run)
    if found is None:
        raise click.ClickException(f"no checkpoint in {run}: train first with --out {run}")
    tensors, record = found
    documents = list(stdlib_documents())
    if text_digest(documents) != record["corpus"]:
        raise click.ClickException(f"{run} was trained on other text: use the Python version that trained it")
    save_model(tensors, to / "model")
    save_tokenizer(run / "tokenizer.json", to / "model")
    trained = [document for document in documents if not is_held_out(document[1])]
    held_out = without_repeats((document for document in documents if is_held_out(document[1])), trained)
    write_held_out(held_out, HELD_OUT_FILE if to.resolve() == PACKAGE.resolve() else to / HELD_OUT_FILE.name)
    description = describe(record, trained, held_out, measure_folder(to / "model", held_out))
    (to / "training_curve.json").write_text(json.dumps(description, indent=1) + "\n")
    for one in description["quality"]:
        click.echo(json.dumps(one))


if __name__ == "__main__":
    main()
