"""From a language model and a corpus to a store, in one pass over the corpus.

`saemill.harvest(model="pocket", layer=19, out="./store")` takes the options of `sae-harvest` and returns the store.
"""

from .. import make_callable

make_callable(__name__)
