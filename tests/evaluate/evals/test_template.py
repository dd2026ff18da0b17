"""The template of an evaluation's test in CONTRIBUTING.md holds of the evaluation there."""

from __future__ import annotations

import inspect

from saemill.evaluate import evals


def test_the_evaluation_of_the_page_passes_the_test_of_the_page(copied, template, request):
    copied(evals, "evaluate/evals/busiest.py")
    exec(template("tests/evaluate/evals/test_busiest.py"), names := {})
    (check,) = (one for name, one in names.items() if name.startswith("test_"))
    check(**{name: request.getfixturevalue(name) for name in inspect.signature(check).parameters})
