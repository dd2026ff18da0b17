"""From trained sparse autoencoders to numbers and pictures.

`saemill.evaluate("run_1", evals="core")` evaluates, with the words of `sae-eval`, and gives a table.
"""

from .. import make_callable

make_callable(__name__)
