"""Training knows no language model and no logger, and importing it starts nothing."""

import os
import subprocess
import sys

CODE = """
import importlib, pkgutil, sys, threading
before = threading.active_count()
import saemill.train
for info in pkgutil.walk_packages(saemill.train.__path__, 'saemill.train.'):
    importlib.import_module(info.name)
loaded = {name.split('.')[0] for name in sys.modules}
assert not loaded & {'transformers', 'wandb', 'tensorboard', 'accelerate', 'datasets', 'huggingface_hub'}, loaded
import torch
assert not torch.cuda.is_initialized()
assert threading.active_count() == before
"""


def test_importing_everything_is_light():
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run([sys.executable, "-c", CODE], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
