"""Every error that a user may meet, one tree; the command line turns each into one line and its exit code.

ExpertsError
+-- ConfigError            64  a setting or a command line that cannot be meant
+-- DataError              65  a data set, picture or caption
+-- StoreError             74  the store
|   +-- StoreMissing       65  nothing there
|   +-- StoreFormat        65  not a store, or not one that this version reads
|   +-- StoreLocked        73  somebody else writes
|   +-- StoreFull          74  no space left
|   +-- StoreIO            74  the disk failed
|   +-- StoreBusy          75  cannot be shared as things stand; try again
|   +-- RecordCorrupt      65  one record does not hold what its key names
|   |   +-- RecordNewer    65  one record that a newer version of this program wrote
|   +-- ManifestMismatch   65  a manifest that is not there, or not the one a run began with
+-- CheckpointError        65  an expert on disk is damaged or incomplete
+-- ContractError          65  two experts, or an expert and a model, that cannot work together
+-- Stopped                75  asked to stop before the end; what was done is saved
"""

EXIT_COMPLETE = 0


class ExpertsError(Exception):
    """An error whose message names the thing and the way out; `exit_code` is what the process ends with."""

    exit_code = 70


class ConfigError(ExpertsError):
    """A setting or a command line that cannot be meant."""

    exit_code = 64


class DataError(ExpertsError):
    """A data set, picture or caption that cannot be used."""

    exit_code = 65


class StoreError(ExpertsError):
    """The store cannot do what was asked."""

    exit_code = 74


class StoreMissing(StoreError):
    """There is no store at the path."""

    exit_code = 65


class StoreFormat(StoreError):
    """The files at the path are not a store that this version can read."""

    exit_code = 65


class StoreLocked(StoreError):
    """Another writer holds the store's lease."""

    exit_code = 73


class StoreFull(StoreError):
    """No space is left for the store; nothing that was acknowledged is lost."""


class StoreIO(StoreError):
    """The disk under the store failed."""


class StoreBusy(StoreError):
    """The store cannot be shared by these processes as things stand."""

    exit_code = 75


class RecordCorrupt(StoreError):
    """One record is absent or does not hold what its key names."""

    exit_code = 65


class RecordNewer(RecordCorrupt):
    """One record is whole, and of a frame version that this program does not know."""


class ManifestMismatch(StoreError):
    """A manifest that is absent, damaged, or not the one that is needed."""

    exit_code = 65


class CheckpointError(ExpertsError):
    """An expert on disk is damaged or incomplete."""

    exit_code = 65


class ContractError(ExpertsError):
    """Two experts, or an expert and a model, that cannot work together."""

    exit_code = 65


class Stopped(ExpertsError):
    """Asked to stop before the end; everything up to here is saved and the same command goes on."""

    exit_code = 75
