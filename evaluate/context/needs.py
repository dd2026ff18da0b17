"""What an evaluation needs to be there before it starts."""

from __future__ import annotations

from dataclasses import dataclass

from .context import Context


@dataclass(frozen=True)
class Needs:
    """An evaluation's file says `NEEDS = Needs(...)`."""

    model: bool = False
    store: bool = False
    from_tokens: bool = False
    """It can compute residuals from the store's tokens in place of reading them (--from-tokens)."""

    def require(self, context: Context) -> None:
        """Raise the NotRun error that names the first thing missing."""
        if self.store:
            _ = context.store
        if self.model:
            context.require_model()
