"""What latents fire on: their strongest contexts, the token they fired on marked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..figures.records import Record
from .markup import Html, element, joined

LATENTS = 12  # of an SAE: a page is to be read


def contexts_of(records: Sequence[Record]) -> Html:
    """A section for each SAE that has contexts."""
    sections = [_section(record) for record in records if record.unstructured("browser").get("latents")]
    return joined([element("h2", "What latents fire on"), *sections]) if sections else Html("")


def _section(record: Record) -> Html:
    latents = record.unstructured("browser")["latents"]
    every = max(1, -(-len(latents) // LATENTS))
    return element("details", element("summary", record.name), *(_latent(latent) for latent in latents[::every]))


def _latent(latent: Mapping[str, Any]) -> Html:
    share = f"latent {latent['latent']}, on {100 * latent['fired_share']:.3g} % of tokens"
    listed = element("ul", *(_context(context) for context in latent["contexts"]), class_="contexts")
    return joined([element("p", share, class_="faint"), listed])


def _context(context: Mapping[str, Any]) -> Html:
    strength = element("span", f"{context['activation']:.2f}", class_="strength")
    words = element("bdi", context["before"], element("mark", context["token"]), context["after"])
    return element("li", strength, words)
