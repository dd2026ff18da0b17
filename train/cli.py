"""`sae-train`: words to a run, and what came of it back to words."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from ..cache_schema import Store
from .ask.records import Ask, Member
from .ask.settings import parse_grid, parse_settings, parse_value
from .command import tell_errors
from .errors import ConfigInvalid
from .kit.registry import names
from .parallel.processes import join
from .recipes import find_recipes, studies
from .run.after_run import after_run
from .run.folder import RunFolder, cache_of
from .run.loop import train
from .run.open import begin_run, resume_run
from .run.outcome import Outcome
from .run.run import Run, Site
from .run.settle import settle

RUNS = "runs"
_OPTIONS = {"layer": "layer", "width": "width", "k": "k", "lr": "optim.lr", "seed": "seed"}
_OPTIONS |= {"tokens": "course.tokens", "epochs": "course.epochs"}
_ALIASES = {"lr": "optim.lr"}


def count(_: click.Context, __: click.Parameter, text: str | None) -> int | None:
    """`50M`, `16k` or a plain number."""
    if text is None:
        return None
    value = parse_value(text.replace("_", "").replace(",", ""))
    is_whole = value.is_integer() if isinstance(value, float) else type(value) is int
    if not is_whole:
        raise click.BadParameter(f"expected a number like 50M, 16k or 4096, found {text!r}")
    return int(value)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--variant", "variants", multiple=True, help=f"Which SAE; again for a fleet. One of: {', '.join(names())}."
)
@click.option(
    "--recipe", metavar="STUDY[/RUN]", help=f"A run of a study, or all its runs. Studies: {', '.join(studies())}."
)
@click.option("--cache", metavar="URL", help="The store: a path, or any fsspec URL such as s3://bucket/store.")
@click.option("--out", default=RUNS, show_default=True, metavar="DIR", help="Where runs are kept.")
@click.option("--name", metavar="NAME", help="Name of the run.  [default: run_N, the next free number]")
@click.option("--tokens", callback=count, metavar="N", help="Tokens to train on, such as 50M.")
@click.option("--epochs", type=click.IntRange(1), metavar="N", help="How often the store may be read.")
@click.option("--layer", type=int, metavar="L", help="The layer to train on.  [default: 19, or the store's only one]")
@click.option(
    "--width",
    callback=count,
    metavar="F",
    help="Latents.  [default: the variant's, at most 16 times the residual width]",
)
@click.option("--k", callback=count, metavar="K", help="Active latents per token, for variants that fix their number.")
@click.option("--lr", type=float, metavar="X", help="Peak learning rate.  [default: the variant's own]")
@click.option("--seed", type=int, metavar="N", help="Of the SAE; the order of the data has its own, data.seed.")
@click.option("--device", default="auto", show_default=True, metavar="NAME", help="auto, cpu, cuda, cuda:1.")
@click.option("--set", "settings", multiple=True, metavar="A.B=V", help="Any other setting, such as optim.beta1=0.")
@click.option("--grid", multiple=True, metavar="A=V,V", help="A fleet over values, such as k=16,32,64.")
@click.option(
    "--with-baselines",
    is_flag=True,
    help="Train sanity baselines beside them: decoder frozen, nearly frozen, encoder frozen, principal components.",
)
@click.option("--resume", metavar="NAME", help="Go on with a run from its last checkpoint.")
@click.option("--plots/--no-plots", default=True, show_default=True, help="Pictures of the run when it has ended.")
def main(
    variants: tuple[str, ...],
    recipe: str | None,
    cache: str | None,
    out: str,
    name: str | None,
    tokens: int | None,
    epochs: int | None,
    device: str,
    settings: tuple[str, ...],
    grid: tuple[str, ...],
    with_baselines: bool,
    resume: str | None,
    plots: bool,
    **chosen: Any,
) -> None:
    """Train sparse autoencoders from a store of activations.

    Several --variant, or a --grid, train side by side from one read of the store; each gets the bits it
    would have had alone.
    """
    console = Console(highlight=False, soft_wrap=True, markup=False)
    with tell_errors():
        site = Site(*join(device), console)
        try:
            if resume is not None:
                others = {"--variant": variants, "--recipe": recipe, "--set": settings, "--grid": grid, "--name": name}
                others["--with-baselines"] = with_baselines or None
                others |= {f"--{key}": value for key, value in (chosen | {"tokens": tokens, "epochs": epochs}).items()}
                _require_alone(resume, others)
                tell(console, _go_on(RunFolder.open(out, resume), cache, site), plots)
            else:
                options = _options(chosen | {"tokens": tokens, "epochs": epochs}, settings)
                points = [_resolve_aliases(point) for point in parse_grid(grid)]
                for ask in _asks(variants, recipe, name, options, points):
                    ask = replace(ask, baselines=with_baselines)
                    tell(console, _start(ask, _require_cache(cache), out, name, site), plots)
        finally:
            site.group.close()


def tell(console: Console, outcome: Outcome | None, plots: bool) -> None:
    """The last lines: what came out, where it is, what to do next. Only one of several processes has them."""
    if outcome is None:
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("SAE", no_wrap=True)
    has_massive = any(sae.validation_massive for sae in outcome.saes.values())
    for column in ("width", "L0", "EV held out", *(["with massive rows"] if has_massive else []), "dead"):
        table.add_column(column, justify="right", no_wrap=True)
    for label, sae in outcome.saes.items():
        cells = [str(sae.width), f"{sae.l0:.1f}", f"{sae.explained_variance:.4f}"]
        if has_massive:
            every = sae.explained_variance_with_massive
            cells.append(f"{sae.explained_variance if every is None else every:.4f}")
        table.add_row(label, *cells, f"{sae.dead_latents} ({sae.dead_share:.1%})")
    console.print(table)
    for line in warnings_of(outcome):
        console.print(line, style="yellow")
    console.print(
        f"{outcome.steps} steps, {outcome.tokens:,} tokens in {outcome.seconds:.0f} s: "
        f"{outcome.tokens_per_second:,.0f} tokens/s, {outcome.waiting_share:.1%} of it waiting for data"
    )
    console.print(
        f"shuffling: {outcome.same_document_share:.3%} of pairs in a batch share a document, "
        f"{outcome.same_document_ideal:.3%} ideally (ratio {outcome.same_document_ratio:.2f})"
    )
    for sae in outcome.saes.values():
        console.print(f"saved: {sae.folder}")
    if plots:
        after_run(folder_of(outcome), console.print)
    console.print(f"next: sae-eval {evaluated_as(outcome)}")


def warnings_of(outcome: Outcome) -> list[str]:
    """What must be said and not only stand in the table."""
    poor = [label for label, sae in outcome.saes.items() if not sae.explained_variance > 0]
    if not poor:
        return []
    return [
        f"warning: {', '.join(poor)}: held-out activations are rebuilt no better than by their mean. "
        "Train on more --tokens, or with a higher --lr or a smaller --width"
    ]


def folder_of(outcome: Outcome) -> Path:
    """The run's folder."""
    return Path(next(iter(outcome.saes.values())).folder).parent


def evaluated_as(outcome: Outcome) -> str:
    """What to call the run at the next command: its name where that looks, else its path."""
    folder = folder_of(outcome)
    return outcome.run if folder == Path(RUNS, outcome.run) else shlex.quote(str(folder))


def _start(ask: Ask, cache: str, out: str, name: str | None, site: Site) -> Outcome | None:
    with Store.open(cache) as store:
        settled = settle(ask, store)
        with begin_run(settled, store, site, out, name) as run:
            if site.is_first:
                _introduce(run, settled.remark)
            return train(run)


def _go_on(folder: RunFolder, cache: str | None, site: Site) -> Outcome | None:
    url, cache_id = cache_of(folder)
    with Store.open(cache or url, expect_cache_id=cache_id) as store, resume_run(folder, store, site) as run:
        return train(run)


def _introduce(run: Run, remark: str) -> None:
    """What is about to happen."""
    run.site.console.print(f"{run.folder.path}: {remark}, {run.total_steps} steps on {run.site.device}")
    for member in run.config.members:
        run.site.console.print(f"  {member.label}: {_settings_of(member)}")
    cut = {found for trainee in run.fleet.trainees.values() for found in trainee.assembly.cut_short(run.total_steps)}
    for asked, given in sorted(cut):
        run.site.console.print(f"the run is short: a warm-up or onset of {asked:,} steps takes {given:,}")
    for layer, stats in run.fleet.stats.items():
        if stats.massive is not None and stats.massive.massive:
            run.site.console.print(
                f"layer {layer}: {stats.massive}: left out (--set data.massive_norms=inf takes them too)"
            )


def _settings_of(member: Member) -> str:
    shown = ("layer", "layers", "width", "k", "seed")
    values = {key: getattr(member.config, key, None) for key in shown}
    return ", ".join(f"{key} {value}" for key, value in values.items() if value is not None)


def _asks(
    variants: tuple[str, ...],
    recipe: str | None,
    name: str | None,
    settings: dict[str, Any],
    points: list[dict[str, Any]],
) -> list[Ask]:
    """The runs to make, one after the other."""
    if variants and recipe is not None:
        raise ConfigInvalid(f"--recipe {recipe} says which SAEs to train: leave out --variant")
    if variants:
        return [Ask.of_variants(variants, settings, points)]
    if recipe is None:
        raise ConfigInvalid(
            f"expected --variant NAME (one of {', '.join(names())}), "
            f"--recipe STUDY/RUN (of {', '.join(studies())}), or --resume NAME"
        )
    found = find_recipes(recipe)
    if name is not None and len(found) > 1:
        raise ConfigInvalid(f"--name {name} is of one run, and the study {recipe} has {len(found)}: leave it out")
    return [Ask.of_recipe(one, settings, points) for one in found]


def _options(chosen: Mapping[str, Any], words: tuple[str, ...]) -> dict[str, Any]:
    """All settings of the command line; --set wins over an option."""
    options = {_OPTIONS[key]: value for key, value in chosen.items() if value is not None}
    return options | _resolve_aliases(parse_settings(words))


def _resolve_aliases(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {_ALIASES.get(key, key): value for key, value in settings.items()}


def _require_cache(cache: str | None) -> str:
    if cache is None:
        raise ConfigInvalid("expected --cache URL, the store to train on")
    return cache


def _require_alone(resume: str, others: Mapping[str, Any]) -> None:
    given = [option for option, value in others.items() if value not in (None, ())]
    if given:
        raise ConfigInvalid(f"--resume {resume} goes on with the settings of that run: leave out {', '.join(given)}")


if __name__ == "__main__":
    main()
