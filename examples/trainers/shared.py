"""What every example of this folder needs: text to train on, and what each of them checks."""

import argparse
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

STEPS = 10
SAVED = 5  # the step after which a checkpoint is written
VOCABULARY = 128  # the source is ASCII


def text(rows: int = 16, columns: int = 33) -> np.ndarray:
    """Bytes of Python's own source, a batch for each step: integers (STEPS, rows, columns).

    A row of each batch follows that of the batch before, and rows are from all over the file.
    """
    source = pathlib.Path(argparse.__file__).read_bytes()
    tokens = np.frombuffer(source, np.uint8, STEPS * rows * columns)
    return tokens.reshape(rows, STEPS, columns).swapaxes(0, 1).astype(np.int32)


def check(losses: Sequence[Any], restarted: Sequence[Any] | None = None) -> None:
    """Fails unless the loss fell, and a restart from the checkpoint gave the same losses again.

    Args:
      losses: Of all STEPS steps.
      restarted: Of the steps after SAVED, by a new trainer that read the checkpoint; None where
        the framework's checkpoint has no optimizer's state.
    """
    losses = [float(loss) for loss in losses]
    print("losses:", *(f"{loss:.4f}" for loss in losses))
    if len(losses) != STEPS or not losses[-1] < losses[0]:
        raise SystemExit(f"The loss should fall over {STEPS} steps.")
    print(f"The loss fell from {losses[0]:.4f} to {losses[-1]:.4f}.")
    if restarted is not None:
        restarted = [float(loss) for loss in restarted]
        print(f"from the checkpoint of step {SAVED}:", *(f"{loss:.4f}" for loss in restarted))
        if restarted != losses[SAVED:]:
            raise SystemExit(f"A restart should give the losses after step {SAVED} again, exactly.")
        print("The restart gave the same losses.")
