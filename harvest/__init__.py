"""From a language model and a corpus to a store, in one pass of the model.

`saemill.harvest(model="pocket", layer=19, out="./store")` harvests, with the words of `sae-harvest`, and gives the
store.
"""

from .. import make_callable

make_callable(__name__)
