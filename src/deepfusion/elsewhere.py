"""Recipes whose devices are elsewhere: which those are, and what cannot be asked of them."""

from __future__ import annotations

from deepfusion.config import FileData, Recipe
from deepfusion.data.corpora import private_row, read_text
from deepfusion.errors import InputError
from deepfusion.inputs import demand

NEEDS_PRIVATE_TEXT = ("centralized", "fedjets", "fedavg_dense", "btx")  # references that train on devices' text


def devices_elsewhere(recipe: Recipe) -> tuple[str, ...]:
    """Names of the devices of a federation whose text only they have.

    None for a recipe without a federation, and for one that has private text of its own, invented or in its files: such
    a recipe can be run on one machine.

    Raises:
        InputError: a file is missing, or has a row that cannot be used.
    """
    if recipe.federation is None or not isinstance(recipe.data.source, FileData):
        return ()
    demand(recipe, "data.")
    return recipe.federation.devices if private_row(recipe.data.source, recipe.seed) is None else ()


def no_run_here(recipe: Recipe, devices: tuple[str, ...]) -> InputError:
    """What is said to those who want to run such a recipe on one machine."""
    return InputError(
        f"recipe {recipe.name} has no private text: its federation's devices ({', '.join(devices)}) have it, and train "
        "where they are. Make the folder from which server and devices are started by deepfusion federation init DIR "
        "--recipe RECIPE, or add rows with split: private to run it on this machine alone"
    )


def refuse_what_needs_text(recipe: Recipe) -> None:
    """Refuse what a federation cannot have, whatever its files say.

    Raises:
        InputError: names the key: there is no federation, a reference trains on private text, the encoder is a model
            that devices do not have, or one that is no device has a way of its own.
    """
    if recipe.federation is None:
        raise InputError(f"recipe {recipe.name} has no `federation` section: say in it which devices may send")
    if asked := [name for name in recipe.evaluate.references if name in NEEDS_PRIVATE_TEXT]:
        raise InputError(
            f"evaluate.references names {asked[0]}, which trains on devices' private text, and a federation's "
            f"server has none: leave out {', '.join(NEEDS_PRIVATE_TEXT)}"
        )
    if recipe.device.encoder != "hashing":
        raise InputError(
            f"device.encoder is {recipe.device.encoder}, a model that devices elsewhere do not have: set it to hashing"
        )
    recipe.device.only_of(recipe.federation.devices)


def refuse(recipe: Recipe) -> None:
    """Refuse a recipe that a federation's server would refuse once it is started.

    Raises:
        InputError: as `refuse_what_needs_text`; or a file or folder is missing, or the server's files have a private
            row, a row that cannot be used, or none for the public text or the test.
    """
    refuse_what_needs_text(recipe)
    demand(recipe)
    if isinstance(recipe.data.source, FileData):
        read_text(recipe.data.source, recipe.seed, private_elsewhere=True)
