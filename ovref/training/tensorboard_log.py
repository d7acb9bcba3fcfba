"""The history of a training for TensorBoard."""

from collections.abc import Mapping
from typing import Any

from ovref.errors import ConfigError
from ovref.storage.file_store import Store
from ovref.training.process_group import place
from ovref.training.settings import TrainingConfig
from ovref_inference.lazy import missing_package


class Summary:
    """Writes rows of the history where TensorBoard finds them, if that is asked for."""

    def __init__(self, config: TrainingConfig, store: Store) -> None:
        """
        Raises:
            MissingPackageError: `tensorboard` is not installed.
            ConfigError: the output is not on this machine.
        """
        self._writer: Any = None
        if not config.tensorboard or place()[0] != 0:
            return
        if not store.is_local:
            raise ConfigError(
                f"tensorboard must be false where the output is not on this machine: {store.url}"
            )
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ModuleNotFoundError as error:
            raise missing_package(error, "training.tensorboard") from error
        self._writer = SummaryWriter(f"{store.url}/tensorboard")

    def __enter__(self) -> "Summary":
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.close()

    def add(self, row: Mapping[str, float]) -> None:
        """One row of the history."""
        if self._writer is not None:
            for name, value in row.items():
                if name != "step":
                    self._writer.add_scalar(name, value, int(row["step"]))
