"""The results of evaluations: one row for each SAE, one column for each metric that sums an evaluation up."""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from rich.console import Console

from ..evaluate.context.write_and_read_results import REACH, Row, heading
from ..evaluate.run.console_table import PIPE_WIDTH, document_of, measured_on, print_results, shown_names
from ..evaluate.run.find_saes_to_evaluate import Absent, say_absent
from . import notebook_html


class Table:
    """What `sae-eval` prints. `pandas.DataFrame(table.rows)` is a frame."""

    def __init__(self, results: Sequence[Row], absent: Sequence[Absent] = ()) -> None:
        text = io.StringIO()
        console = Console(file=text, width=PIPE_WIDTH, markup=False, highlight=False, soft_wrap=True)
        print_results(console, results, absent)
        self._text = text.getvalue().rstrip()  # now: rows hold the weights of their SAEs
        good = [row for row in results if row.document is not None]
        self.results = [row.document for row in good]
        """Everything that was measured, as it is on disk, but for `eval_result_details`."""
        lines = measured_on(good, shown_names(row.subject for row in results))
        self._measured_on = [line for line in lines if not line.startswith(REACH)]  # no cell shows it
        self._attempts = document_of(results, [], [])["results"]
        self._absent = say_absent(absent)

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        rows: dict[str, dict[str, Any]] = {}
        for attempt in self._attempts:
            rows.setdefault(attempt["sae"], {"sae": attempt["sae"]}).update(attempt["metrics"])
        return list(rows.values())

    @property
    def notes(self) -> list[str]:
        """What is not in the table and why, and what in it cannot be right."""
        missing = [
            f"{a['status']}: {a['evaluation']} of {a['sae']}: {a['reason']}" for a in self._attempts if a["reason"]
        ]
        warnings = [f"warning: {a['sae']}: {text}" for a in self._attempts for text in a["warnings"]]
        return list(dict.fromkeys(missing + self._absent + warnings))

    def __repr__(self) -> str:
        return self._text

    def _repr_html_(self) -> str:
        columns = dict.fromkeys(column for row in self.rows for column in row)
        notes = [*self._measured_on, *self.notes]
        return notebook_html.table(self.rows, notes=notes, heading=lambda column: heading(column, columns))
