"""Checkpoints by Orbax: a save is there as a whole or not at all, whenever the process ends.

Orbax sees a file that is missing, but not one whose bytes have changed, and a file that it cannot
read makes its threads print tracebacks. So every checkpoint gets the checksums of its files.
"""

import contextlib
import hashlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from examples.command_line import UserError
from examples.run_folder import read_json, write_atomically

KEPT = 3
CHECKSUMS = "sha256.json"
ADVICE = "without that folder --resume goes on from an earlier checkpoint, if there is one"


@contextlib.contextmanager
def opened(folder: Path) -> Iterator[ocp.CheckpointManager]:
    """Opens the manager of a folder of checkpoints."""
    # What matters of Orbax's log also comes as an exception, which becomes one line for the user.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    # A train step donates its state's buffers, which on CPU an asynchronous save may still read.
    options = ocp.CheckpointManagerOptions(
        max_to_keep=KEPT, enable_async_checkpointing=False, cleanup_tmp_directories=True
    )
    with contextlib.closing(ocp.CheckpointManager(folder.absolute(), options=options)) as manager:
        yield manager


def save(manager: ocp.CheckpointManager, step: int, state: Any) -> None:
    """Saves the state after `step` steps; raises UserError where that fails."""
    try:
        manager.save(step, args=ocp.args.StandardSave(state), force=True)
    except Exception as error:  # Orbax and TensorStore raise many types
        raise UserError(
            f"cannot save step {step} in {manager.directory}: {_reason(error)}; once it can be "
            "written, --resume goes on from the checkpoint before"
        ) from error
    if jax.process_index() == 0:
        folder = Path(manager.directory, str(step))
        write_atomically(folder / CHECKSUMS, json.dumps(_checksums(folder), indent=1))


def restore(manager: ocp.CheckpointManager, shapes: Any) -> tuple[int, Any] | None:
    """Restores the newest checkpoint.

    Args:
        manager: Where to look.
        shapes: The state that is expected, as shapes and dtypes; with shardings it comes back on
            their mesh, whatever mesh it was saved on.

    Returns:
        Its step and state, or None where nothing was saved yet.

    Raises:
        UserError: If it is damaged, or of another model or optimizer.
    """
    step = manager.latest_step()
    if step is None:
        return None
    folder = Path(manager.directory, str(step))
    _check(folder)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding or device),
        shapes,
    )
    try:
        return step, manager.restore(step, args=ocp.args.StandardRestore(target))
    except Exception as error:  # Orbax and TensorStore raise many types
        raise UserError(
            f"{folder} is not a checkpoint of this model: {_reason(error)}; {ADVICE}"
        ) from error


def _reason(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200] or type(error).__name__


def _check(folder: Path) -> None:
    """Raises UserError where a file is not what was saved."""
    try:
        saved = read_json((folder / CHECKSUMS).read_text("utf-8"))
    except FileNotFoundError:
        return  # Killed between the save, which is then complete, and its checksums.
    except (OSError, ValueError):
        saved = None
    if saved != _checksums(folder):
        raise UserError(f"{folder} is damaged: its files are not what was saved; {ADVICE}")


def _checksums(folder: Path) -> dict[str, str]:
    checksums = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != CHECKSUMS:
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            checksums[path.relative_to(folder).as_posix()] = digest
    return checksums
