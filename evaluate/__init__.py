"""From trained sparse autoencoders to numbers and pictures.

`saemill.evaluate("run_1", evals="core")` takes the options of `sae-eval` and returns a table.
"""

from .. import make_callable

make_callable(__name__)
